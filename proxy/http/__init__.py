"""What every handler needs of HTTP: bodies, errors, headers, connections."""
