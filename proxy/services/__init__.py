"""What handlers may use: one record per kind of handler, made once per worker and handed over by the application."""
