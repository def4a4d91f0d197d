"""Knows money: quotes, holds, the ledger, wallets, exchange rates, the sweeper. Knows no HTTP server."""
