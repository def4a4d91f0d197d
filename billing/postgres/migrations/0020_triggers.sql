SELECT audit_table('model_prices', '{id}'); -- a change of what is billed beside tokens is audited, too
