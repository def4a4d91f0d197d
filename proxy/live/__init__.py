"""Who watches a wallet's feed, and what they are sent."""
