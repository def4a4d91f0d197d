"""What a call may cost and did cost: price book, token counts, quotes."""
