-- The triggers of the first eighteen migrations. They are made after the functions, which they need.

-- What is append-only: the journal, and what it is proved by. A partition needs a trigger against TRUNCATE of its own; ALWAYS:
-- whoever replicates into these tables may only add, too.
CREATE TRIGGER journal_tx_append_only BEFORE UPDATE OR DELETE ON journal_tx FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER journal_entry_append_only BEFORE UPDATE OR DELETE ON journal_entry FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER shadow_usd_ledger_append_only BEFORE UPDATE OR DELETE ON shadow_usd_ledger FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER fx_rates_append_only BEFORE UPDATE OR DELETE ON fx_rates FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER audit_blocks_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_blocks
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();
ALTER TABLE audit_log ENABLE ALWAYS TRIGGER audit_log_append_only;
ALTER TABLE audit_blocks ENABLE ALWAYS TRIGGER audit_blocks_append_only;
SELECT refuse_truncate(c.relname)
FROM pg_class c LEFT JOIN pg_inherits i ON i.inhrelid = c.oid
WHERE 'journal_tx'::regclass IN (c.oid, i.inhparent) OR 'journal_entry'::regclass IN (c.oid, i.inhparent)
   OR c.oid IN ('shadow_usd_ledger'::regclass, 'fx_rates'::regclass);

-- What is audited: who may do what, what is paid, and every posting but settlements.
SELECT audit_table('users', '{id}'),
       audit_table('wallets', '{id}', '{posted_nano,held_nano,capped}'), -- moved by calls; `capped` follows spending_caps
       audit_table('api_keys', '{id}', '{last_used_at}'),
       audit_table('spending_caps', '{scope,scope_id,period}', '{updated_at}'),
       audit_table('model_prices', '{id}'),
       audit_table('fx_quotes', '{id}', '{confirmed_at}'),
       audit_table('provider_openings', '{source}'),
       audit_table('payment_intents', '{id}', '{poll_at,polls,method_due}'),
       audit_table('payment_credits', '{provider,provider_txn_id}'),
       audit_table('payment_reversals', '{id}', '{poll_at,polls}'),
       audit_table('payment_methods', '{wallet_id}'),
       audit_table('auto_topups', '{wallet_id}');
CREATE CONSTRAINT TRIGGER journal_tx_audited AFTER INSERT ON journal_tx DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.kind <> 'settlement') EXECUTE FUNCTION audit_posting();

-- What running workers are told. Not when a key was used, nor when its secret is kept under another pepper.
CREATE TRIGGER api_keys_changed
    AFTER UPDATE OF wallet_id, revoked_at, expires_at, rotated_at, models, networks, manages, requests_per_min, tokens_per_min,
        calls_in_flight ON api_keys
    FOR EACH ROW EXECUTE FUNCTION notify_change('key');
CREATE TRIGGER users_changed AFTER UPDATE OF status, requests_per_min, tokens_per_min, calls_in_flight ON users
    FOR EACH ROW EXECUTE FUNCTION notify_change('user');
CREATE TRIGGER wallets_changed AFTER UPDATE OF status, overdraft_nano ON wallets
    FOR EACH ROW EXECUTE FUNCTION notify_change('wallet');
CREATE TRIGGER model_prices_changed AFTER INSERT OR UPDATE ON model_prices
    FOR EACH ROW EXECUTE FUNCTION notify_change('prices');
CREATE TRIGGER fx_quotes_changed AFTER INSERT OR UPDATE ON fx_quotes FOR EACH ROW EXECUTE FUNCTION notify_change('fx');

-- What is kept with what changes: the quota, caps, the sums of usage.
CREATE TRIGGER shadow_usd_ledger_correction AFTER INSERT ON shadow_usd_ledger
    FOR EACH ROW WHEN (NEW.kind = 'correction') EXECUTE FUNCTION spend_correction();
CREATE TRIGGER wallets_capped BEFORE INSERT ON wallets FOR EACH ROW EXECUTE FUNCTION cap_new_wallet();
CREATE TRIGGER calls_usage_kept
    BEFORE UPDATE OF state, accuracy, cost_nanousd, charge_nano, spread_nano, house_nanousd ON calls
    FOR EACH STATEMENT EXECUTE FUNCTION require_usage_kept();

-- Payments.
CREATE TRIGGER payment_intents_method BEFORE UPDATE OF state ON payment_intents FOR EACH ROW
    WHEN (NEW.state = 'paid' AND OLD.state <> 'paid' AND NEW.method_due) EXECUTE FUNCTION look_for_method();
CREATE TRIGGER payment_intents_auto_paid AFTER UPDATE OF state ON payment_intents FOR EACH ROW
    WHEN (NEW.state = 'paid' AND OLD.state <> 'paid' AND NEW.kind = 'auto') EXECUTE FUNCTION forgive_failures();
CREATE TRIGGER payment_reversals_lost AFTER INSERT ON payment_reversals FOR EACH ROW
    WHEN (NEW.kind = 'dispute' AND NEW.state = 'final') EXECUTE FUNCTION freeze_for_lost_dispute();

-- The feed is told by triggers, so that no posting can forget it. Triggers of the journal run at the commit, as whoever commits.
CREATE TRIGGER calls_opened_told AFTER INSERT ON calls REFERENCING NEW TABLE AS opened
    FOR EACH STATEMENT EXECUTE FUNCTION tell_opened();
CREATE TRIGGER calls_moved_told AFTER UPDATE ON calls REFERENCING OLD TABLE AS was NEW TABLE AS became
    FOR EACH STATEMENT EXECUTE FUNCTION tell_moved();
CREATE CONSTRAINT TRIGGER journal_tx_told AFTER INSERT ON journal_tx DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.wallet_id IS NOT NULL AND NEW.kind <> 'settlement') EXECUTE FUNCTION tell_posted();
CREATE TRIGGER wallets_told AFTER UPDATE OF status, overdraft_nano ON wallets FOR EACH ROW
    WHEN (OLD.status <> NEW.status OR OLD.overdraft_nano <> NEW.overdraft_nano) EXECUTE FUNCTION tell_wallet();
CREATE TRIGGER events_told AFTER INSERT ON events FOR EACH ROW
    WHEN (NEW.kind IN ('cap.spent', 'wallet.low', 'auto_topup.failed')) EXECUTE FUNCTION tell_event();

-- The months of now; `tuma serve` makes those that come.
SELECT ensure_partitions(3);
