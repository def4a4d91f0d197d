"""The proof: I1 to I8, days that are proved once, and the comparison with the provider's bill."""
