"""How Redis is reached: one server or a cluster, commands in pipelines."""
