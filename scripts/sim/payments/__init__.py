"""Simulated payment providers: Stripe, Paystack and Flutterwave, with books of their own."""
