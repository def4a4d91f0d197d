"""What Redis admits: holds, caps, rates and leases, by one script each."""
