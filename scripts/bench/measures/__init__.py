"""What is measured beside rounds of calls: capacities, large books, waiting streams, workers."""
