SELECT audit_table('payment_reversals', '{id}', '{poll_at,polls}'); -- who has a refund sent again is audited
