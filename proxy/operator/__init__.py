"""``/admin``: the operator's API."""
