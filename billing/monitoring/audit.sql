-- The audit log: rows are written by triggers in the transaction that changes, and sealed in blocks, each a hash over the
-- rows' stored bytes and the block before.

-- Write one row. Who acts is what the application said for this transaction (billing/actor.py).
CREATE OR REPLACE FUNCTION write_audit(
    p_action text, p_subject text, p_subject_id text, p_user uuid, p_wallet uuid, p_before jsonb, p_after jsonb
) RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    made audit_log;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(1635083369); -- "audi": nothing is sealed past a number that is drawn and not committed
    made.id := nextval('audit_log_id');
    made.at := now();
    made.actor := coalesce(nullif(current_setting('tuma.actor', true), ''), 'system');
    made.db_role := session_user;
    made.action := p_action;
    made.subject := p_subject;
    made.subject_id := p_subject_id;
    made.user_id := p_user;
    made.wallet_id := p_wallet;
    made.request_id := nullif(current_setting('tuma.request_id', true), '');
    made.before := p_before;
    made.after := p_after;
    made.line := json_build_object(
        'id', made.id, 'at', to_char(made.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), 'actor', made.actor,
        'db_role', made.db_role, 'action', made.action, 'subject', made.subject, 'subject_id', made.subject_id,
        'user_id', made.user_id, 'wallet_id', made.wallet_id, 'request_id', made.request_id,
        'before', made.before, 'after', made.after)::text;
    INSERT INTO audit_log SELECT made.*;
END $$;
REVOKE EXECUTE ON FUNCTION write_audit FROM PUBLIC;

-- A row without its secrets: that there is one shows, and that it is another than before.
CREATE OR REPLACE FUNCTION hide_secrets(p_row jsonb, p_before jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
    SELECT jsonb_object_agg(c.key, CASE WHEN c.value = 'null' OR c.key !~ 'hmac|secret' OR c.key ~ '_(at|until)$' THEN c.value
                                        WHEN p_before -> c.key <> c.value THEN '"hidden: changed"' ELSE '"hidden"' END)
    FROM jsonb_each(p_row) c
$$;

-- The trigger of audit_table. Arguments: the key's columns; the columns that are not audited.
CREATE OR REPLACE FUNCTION audit_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    idle   text[] := TG_ARGV[1];
    before jsonb;
    after  jsonb;
    body   jsonb;
    purse  uuid;
    owner  uuid;
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM write_audit('truncated', TG_TABLE_NAME, '', NULL, NULL, NULL, NULL);
        RETURN NULL;
    END IF;
    IF TG_OP <> 'INSERT' THEN
        before := to_jsonb(OLD) - idle;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        after := to_jsonb(NEW) - idle;
    END IF;
    IF before = after THEN
        RETURN NULL;
    END IF;
    body := coalesce(after, before);
    purse := CASE WHEN TG_TABLE_NAME = 'wallets' THEN body ->> 'id'
                  WHEN TG_TABLE_NAME <> 'spending_caps' THEN body ->> 'wallet_id'
                  WHEN body ->> 'scope' = 'wallet' THEN body ->> 'scope_id'
                  WHEN body ->> 'scope' = 'key' THEN (SELECT k.wallet_id::text FROM api_keys k WHERE k.id = (body ->> 'scope_id')::uuid)
             END;
    owner := CASE WHEN TG_TABLE_NAME = 'users' THEN body ->> 'id'
                  ELSE coalesce(body ->> 'user_id', (SELECT w.user_id::text FROM wallets w WHERE w.id = purse)) END;
    PERFORM write_audit(
        CASE TG_OP WHEN 'INSERT' THEN 'created' WHEN 'UPDATE' THEN 'changed' ELSE 'removed' END, TG_TABLE_NAME,
        (SELECT string_agg(body ->> k.name, ':' ORDER BY k.ord) FROM unnest(TG_ARGV[0]::text[]) WITH ORDINALITY AS k (name, ord)),
        owner, purse, hide_secrets(before, before), hide_secrets(after, before));
    RETURN NULL;
END $$;
REVOKE EXECUTE ON FUNCTION audit_change FROM PUBLIC; -- else anybody might put it on a table of their own

-- Audit a table: every column but `p_idle`. An update that sets only those pays nothing. To be called again in a numbered
-- file of triggers where a column is added.
CREATE OR REPLACE FUNCTION audit_table(p_table text, p_key text[], p_idle text[] DEFAULT '{}') RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    watched text;
BEGIN
    SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) INTO watched FROM pg_attribute a
    WHERE a.attrelid = p_table::regclass AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
      AND a.attname <> ALL (p_idle);
    EXECUTE format('CREATE OR REPLACE TRIGGER %I AFTER INSERT OR DELETE OR UPDATE OF %s ON %I FOR EACH ROW EXECUTE FUNCTION'
                   ' audit_change(%L, %L)', p_table || '_audited', watched, p_table, p_key, p_idle);
    EXECUTE format('CREATE OR REPLACE TRIGGER %I AFTER TRUNCATE ON %I FOR EACH STATEMENT EXECUTE FUNCTION audit_change()',
                   p_table || '_truncation_audited', p_table);
END $$;

-- Postings other than settlements, with their entries and the wallet's balance, as they stand at the commit.
CREATE OR REPLACE FUNCTION audit_posting() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    entries jsonb;
    moved   bigint;
    purse   wallets;
    before  jsonb;
    after   jsonb := to_jsonb(NEW);
BEGIN
    SELECT jsonb_agg(jsonb_build_object('account', e.account, 'wallet_id', e.wallet_id, 'currency', e.currency,
                                        'amount_nano', e.amount_nano) ORDER BY e.seq),
           sum(e.amount_nano) FILTER (WHERE e.wallet_id = NEW.wallet_id)
    INTO entries, moved
    FROM journal_entry e WHERE e.tx_id = NEW.id;
    after := after || jsonb_build_object('entries', coalesce(entries, '[]'));
    SELECT * INTO purse FROM wallets w WHERE w.id = NEW.wallet_id;
    IF FOUND THEN
        before := jsonb_build_object('posted_nano', purse.posted_nano - coalesce(moved, 0));
        after := after || jsonb_build_object('posted_nano', purse.posted_nano);
    END IF;
    PERFORM write_audit(NEW.kind, 'journal_tx', NEW.id::text, purse.user_id, NEW.wallet_id, before, after);
    RETURN NULL;
END $$;
REVOKE EXECUTE ON FUNCTION audit_posting FROM PUBLIC;

-- Seal the next block of at most 1,000 rows; returns none when there is nothing to seal. It waits a moment for the
-- transactions that are writing rows, and lets none begin meanwhile: so every number up to the last is there or never
-- will be. lock_not_available: one of them takes longer.
CREATE OR REPLACE FUNCTION seal_audit() RETURNS TABLE (number bigint, digest bytea, rows integer)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET lock_timeout = '250ms' AS $$
#variable_conflict use_column
DECLARE
    head audit_blocks;
    made audit_blocks;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'rows committed while waiting would not be seen' USING ERRCODE = 'invalid_transaction_state';
    END IF;
    PERFORM pg_advisory_xact_lock(1635083369);
    SELECT * INTO head FROM audit_blocks b ORDER BY b.number DESC LIMIT 1;
    SELECT array_agg(r.id ORDER BY r.id), string_agg(sha256(convert_to(r.line, 'UTF8')), '' ORDER BY r.id)
    INTO made.ids, made.leaves
    FROM (SELECT l.id, l.line FROM audit_log l
          WHERE l.id > coalesce(head.ids[cardinality(head.ids)], 0) ORDER BY l.id LIMIT 1000) r;
    IF made.ids IS NULL THEN
        RETURN;
    END IF;
    made.number := coalesce(head.number, 0) + 1;
    made.previous := coalesce(head.digest, '');
    made.sealed_at := clock_timestamp();
    made.digest := sha256(made.previous
        || convert_to(format('%s %s ', made.number, (extract(epoch FROM made.sealed_at) * 1000000)::bigint), 'UTF8') || made.leaves);
    INSERT INTO audit_blocks SELECT made.*;
    RETURN QUERY SELECT made.number, made.digest, cardinality(made.ids);
END $$;
REVOKE EXECUTE ON FUNCTION seal_audit FROM PUBLIC;
