-- What the proxy asks of Postgres, as functions: its role may call them, and do nothing else (billing/access.py).

-- Workers.
CREATE FUNCTION register_worker(p_id uuid, p_host text, p_pid integer, p_lease interval) RETURNS void LANGUAGE sql AS $$
    INSERT INTO workers (id, host, pid, lease_until) VALUES (p_id, p_host, p_pid, now() + p_lease)
$$;
CREATE FUNCTION renew_worker(p_id uuid, p_lease interval) RETURNS void LANGUAGE sql AS $$
    UPDATE workers SET lease_until = now() + p_lease WHERE id = p_id
$$;
CREATE FUNCTION sign_off_worker(p_id uuid) RETURNS void LANGUAGE sql AS $$
    UPDATE workers SET stopped_at = now() WHERE id = p_id
$$;

-- The ids of answers; rows that somebody else has locked are left out. Returns those calls that are noted now.
CREATE FUNCTION note_generations(p_id uuid[], p_generation text[]) RETURNS SETOF uuid LANGUAGE plpgsql AS $$
BEGIN
    RETURN QUERY
    WITH found AS (
        SELECT c.id, n.generation FROM calls c JOIN unnest(p_id, p_generation) AS n (id, generation) ON n.id = c.id
        WHERE c.state = 'open' FOR NO KEY UPDATE OF c SKIP LOCKED
    ), noted AS (
        UPDATE calls c SET generation_id = found.generation FROM found
        WHERE c.id = found.id AND c.generation_id IS DISTINCT FROM found.generation
    )
    SELECT found.id FROM found;
END $$;

-- The provider's account.
CREATE FUNCTION read_pause() RETURNS TABLE (unlimited boolean, pause_reason text, left_s double precision) LANGUAGE sql STABLE AS $$
    SELECT q.granted_nanousd IS NULL, q.pause_reason, extract(epoch FROM q.paused_until - now())::double precision FROM provider_quota q
$$;
CREATE FUNCTION pause_provider(p_pause interval, p_reason text) RETURNS void LANGUAGE sql AS $$
    UPDATE provider_quota SET paused_until = now() + p_pause, pause_reason = p_reason;
    SELECT pg_notify('tuma', 'quota:')
$$;
CREATE FUNCTION return_slab(p_worker uuid, p_kept bigint) RETURNS void LANGUAGE sql AS $$
    UPDATE quota_slabs SET leased_nanousd = spent_nanousd + p_kept WHERE worker_id = p_worker
$$;

-- What calls are priced with.
CREATE FUNCTION list_prices()
RETURNS TABLE (id text, name text, created_at timestamptz, context_tokens bigint, completion_tokens_max bigint, price_id uuid,
               prompt_usd numeric, completion_usd numeric, cached_read_usd numeric, cached_write_usd numeric,
               reasoning_usd numeric, image_usd numeric, audio_usd numeric, request_usd numeric)
LANGUAGE sql STABLE AS $$
    SELECT m.id, m.name, m.created_at, m.context_tokens, m.completion_tokens_max, p.id, p.prompt_usd, p.completion_usd,
           p.cached_read_usd, p.cached_write_usd, p.reasoning_usd, p.image_usd, p.audio_usd, p.request_usd
    FROM models m JOIN model_prices p ON p.model_id = m.id AND p.valid_to IS NULL ORDER BY m.id
$$;
CREATE FUNCTION list_fx_quotes() RETURNS TABLE (id uuid, currency text, rate numeric, markup_bps integer) LANGUAGE sql STABLE AS $$
    SELECT f.id, f.currency, f.rate, f.markup_bps FROM fx_quotes f WHERE f.superseded_at IS NULL
$$;

CREATE FUNCTION read_schema() RETURNS integer LANGUAGE sql STABLE AS $$
    SELECT coalesce(max(s.number), 0) FROM schema_migrations s
$$;
CREATE FUNCTION find_owner(p_wallet uuid) RETURNS uuid LANGUAGE sql STABLE AS $$
    SELECT w.user_id FROM wallets w WHERE w.id = p_wallet
$$;

-- What the provider billed without a call, or, where negative, what was posted so before and had a call after all.
CREATE FUNCTION book_loss(p_tx uuid, p_amount bigint, p_memo text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO journal_tx (id, kind, memo) VALUES (p_tx, 'house_loss', p_memo);
    PERFORM post_entries(
        ARRAY[p_tx, p_tx, p_tx, p_tx], ARRAY[1, 2, 3, 4]::smallint[],
        ARRAY['house_loss', 'revenue', 'provider_cost', 'provider_prepaid'], ARRAY[NULL, NULL, NULL, NULL]::uuid[],
        ARRAY['USD', 'USD', 'USD', 'USD'], ARRAY[-p_amount, p_amount, -p_amount, p_amount]);
    INSERT INTO shadow_usd_ledger (id, kind, amount_nanousd, memo) VALUES (p_tx, 'correction', p_amount, 'reconciliation');
END $$;

-- The operator's.
CREATE FUNCTION create_user(p_id uuid, p_email text, p_subject text) RETURNS void LANGUAGE sql AS $$
    INSERT INTO users (id, email, subject) VALUES (p_id, p_email, p_subject)
$$;
CREATE FUNCTION create_wallet(p_id uuid, p_user uuid, p_currency text, p_overdraft bigint) RETURNS void LANGUAGE sql AS $$
    INSERT INTO wallets (id, user_id, currency, overdraft_nano) VALUES (p_id, p_user, p_currency, p_overdraft)
$$;
-- What is NULL stays as it is. False: there is no such wallet.
ALTER TABLE wallets ADD COLUMN status_reason text NOT NULL DEFAULT ''; -- why it was frozen, or let go again; for operators
CREATE FUNCTION set_wallet(p_wallet uuid, p_status text, p_overdraft bigint, p_reason text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE wallets w SET status = coalesce(p_status, w.status), overdraft_nano = coalesce(p_overdraft, w.overdraft_nano),
           status_reason = CASE WHEN p_status IS NULL THEN w.status_reason ELSE coalesce(p_reason, '') END
    WHERE w.id = p_wallet;
    RETURN FOUND;
END $$;
-- Limits of 0 lift those of the user's own; what is NULL stays as it is. False: there is no such user.
CREATE FUNCTION set_user(
    p_user uuid, p_status text, p_requests_per_min bigint, p_tokens_per_min bigint, p_calls_in_flight bigint
) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE users u SET status = coalesce(p_status, u.status),
           requests_per_min = nullif(coalesce(p_requests_per_min, u.requests_per_min), 0),
           tokens_per_min = nullif(coalesce(p_tokens_per_min, u.tokens_per_min), 0),
           calls_in_flight = nullif(coalesce(p_calls_in_flight, u.calls_in_flight), 0)
    WHERE u.id = p_user;
    RETURN FOUND;
END $$;

-- A person's own. Who they are is said by the transaction (`app.user_id`, which Tuma sets) or by Supabase's auth.uid(), and
-- never by an argument.
DO $$
BEGIN
    IF to_regprocedure('auth.uid()') IS NULL THEN
        CREATE SCHEMA IF NOT EXISTS auth;
        -- As Supabase's, for servers that have none.
        CREATE FUNCTION auth.uid() RETURNS uuid LANGUAGE sql STABLE AS $uid$
            SELECT coalesce(nullif(current_setting('request.jwt.claim.sub', true), ''),
                            nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid
        $uid$;
    END IF;
END $$;
CREATE FUNCTION current_person() RETURNS uuid LANGUAGE sql STABLE AS $$
    SELECT coalesce(auth.uid(), nullif(current_setting('app.user_id', true), '')::uuid)
$$;
CREATE FUNCTION require_person() RETURNS uuid LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF current_person() IS NULL THEN
        RAISE EXCEPTION 'nobody is signed in' USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN current_person();
END $$;

CREATE FUNCTION own_create_key(
    p_id uuid, p_wallet uuid, p_most integer, p_name text, p_hint text, p_hmac bytea, p_pepper text,
    p_expires_at timestamptz, p_models text[], p_networks cidr[], p_manages boolean,
    p_requests_per_min bigint, p_tokens_per_min bigint, p_calls_in_flight bigint, p_cap_periods text[], p_cap_limits bigint[]
) RETURNS void LANGUAGE sql AS $$
    SELECT create_key(p_id, p_wallet, require_person(), p_most, p_name, p_hint, p_hmac, p_pepper, p_expires_at, p_models,
                      p_networks, p_manages, p_requests_per_min, p_tokens_per_min, p_calls_in_flight, p_cap_periods, p_cap_limits)
$$;
CREATE FUNCTION own_revoke_key(p_key uuid, p_wallet uuid) RETURNS void LANGUAGE sql AS $$
    SELECT revoke_key(p_key, require_person(), p_wallet)
$$;
CREATE FUNCTION own_rotate_key(p_key uuid, p_wallet uuid, p_hint text, p_hmac bytea, p_pepper text, p_overlap interval)
RETURNS boolean LANGUAGE sql AS $$
    SELECT rotate_key(p_key, require_person(), p_wallet, p_hint, p_hmac, p_pepper, p_overlap)
$$;
CREATE FUNCTION own_keys(p_key uuid, p_wallet uuid, p_revoked boolean, p_after uuid, p_limit integer)
RETURNS TABLE (id uuid, wallet_id uuid, user_id uuid, currency text, name text, hint text, pepper text, status text,
               created_at timestamptz, rotated_at timestamptz, previous_until timestamptz, expires_at timestamptz,
               revoked_at timestamptz, last_used_at timestamptz, models text[], networks cidr[], manages boolean,
               requests_per_min bigint, tokens_per_min bigint, calls_in_flight bigint)
LANGUAGE sql STABLE AS $$
    SELECT * FROM list_keys(p_key, require_person(), p_wallet, p_revoked, p_after, p_limit)
$$;
-- The limits of one's own wallet or key, beside the operator's ceilings.
CREATE FUNCTION own_set_caps(p_scope text, p_scope_id uuid, p_period text[], p_limit bigint[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM wallets w LEFT JOIN api_keys k ON k.wallet_id = w.id AND p_scope = 'key'
                   WHERE w.user_id = require_person() AND p_scope IN ('wallet', 'key')
                     AND p_scope_id = CASE p_scope WHEN 'wallet' THEN w.id ELSE k.id END) THEN
        RAISE EXCEPTION 'no % %', p_scope, p_scope_id USING ERRCODE = 'no_data_found';
    END IF;
    PERFORM set_caps(p_scope, p_scope_id, false, p_period, p_limit);
END $$;
CREATE FUNCTION own_caps(p_scope_id uuid[], p_moment timestamptz)
RETURNS TABLE (scope text, scope_id uuid, period text, currency text, limit_nano bigint, ceiling_nano bigint, effective_nano bigint,
               starts_at timestamptz, ends_at timestamptz, held_nano bigint, spent_nano bigint)
LANGUAGE sql STABLE AS $$
    SELECT l.scope, l.scope_id, l.period, l.currency, l.limit_nano, l.ceiling_nano, l.effective_nano, l.starts_at, l.ends_at,
           l.held_nano, l.spent_nano
    FROM list_caps(ARRAY(SELECT DISTINCT s.scope_id FROM spending_caps s
                         WHERE s.scope_id = ANY (p_scope_id) AND s.user_id = require_person()), p_moment) l
$$;
