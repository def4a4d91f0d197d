"""Exchange rates: fetched, believed within bounds, quoted with a markup."""
