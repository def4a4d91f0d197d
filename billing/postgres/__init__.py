"""How Postgres is reached: pools, roles, migrations, functions, group commit."""
