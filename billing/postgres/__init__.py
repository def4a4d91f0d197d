"""How Postgres is reached: pools, roles, migrations, group commit."""
