-- Keys: how their secrets change, who may use them and for what, and when they were used.

-- Whether a key may manage keys and caps: caps may come later.
CREATE OR REPLACE FUNCTION may_manage(p_key api_keys) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT p_key.manages AND NOT EXISTS (SELECT FROM spending_caps s WHERE s.scope_id = p_key.id)
$$;

-- The key that a secret opens now, given by its digest under each pepper, and for how long it will.
CREATE OR REPLACE FUNCTION find_key(p_digests bytea[])
RETURNS TABLE (digest bytea, current boolean, id uuid, wallet_id uuid, user_id uuid, currency text, requests_per_min bigint,
               tokens_per_min bigint, calls_in_flight bigint, user_requests_per_min bigint, user_tokens_per_min bigint,
               user_calls_in_flight bigint, models text[], networks cidr[], manages boolean, valid_s double precision)
LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
BEGIN -- plpgsql keeps the plan
    RETURN QUERY
    SELECT f.digest, f.current, k.id, k.wallet_id, w.user_id, w.currency, k.requests_per_min, k.tokens_per_min,
           k.calls_in_flight, u.requests_per_min, u.tokens_per_min, u.calls_in_flight, k.models, k.networks, may_manage(k),
           extract(epoch FROM least(k.expires_at, f.until) - clock_timestamp())::double precision
    FROM (
        SELECT c.id, c.secret_hmac AS digest, true AS current, NULL::timestamptz AS until
        FROM api_keys c WHERE c.secret_hmac = ANY (p_digests)
        UNION ALL
        SELECT p.id, p.previous_hmac, false, p.previous_until FROM api_keys p WHERE p.previous_hmac = ANY (p_digests)
    ) f
    JOIN api_keys k ON k.id = f.id JOIN wallets w ON w.id = k.wallet_id JOIN users u ON u.id = w.user_id
    WHERE k.revoked_at IS NULL AND u.status = 'active' AND coalesce(least(k.expires_at, f.until) > clock_timestamp(), true);
END $$;

-- Keep a secret under another pepper.
CREATE OR REPLACE FUNCTION rehash_key(p_key uuid, p_old bytea, p_new bytea, p_pepper text) RETURNS void LANGUAGE sql AS $$
    UPDATE api_keys SET secret_hmac = p_new, pepper = p_pepper WHERE id = p_key AND secret_hmac = p_old
$$;

-- Lock a key; who asks for another's is told that there is none.
-- p_user NULL: the operator, who may reach all. p_wallet NULL: all wallets of the user.
CREATE OR REPLACE FUNCTION lock_key(p_key uuid, p_user uuid, p_wallet uuid) RETURNS api_keys LANGUAGE plpgsql AS $$
DECLARE
    locked api_keys%ROWTYPE;
BEGIN
    SELECT k.* INTO locked FROM api_keys k JOIN wallets w ON w.id = k.wallet_id
    WHERE k.id = p_key AND (p_user IS NULL OR w.user_id = p_user) AND (p_wallet IS NULL OR w.id = p_wallet)
    FOR NO KEY UPDATE OF k;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no key %', p_key USING ERRCODE = 'no_data_found';
    END IF;
    RETURN locked;
END $$;

-- Make a key, and its caps with it. p_most bounds how many keys a user has that can be used; NULL: no bound.
CREATE OR REPLACE FUNCTION create_key(
    p_id uuid, p_wallet uuid, p_user uuid, p_most integer, p_name text, p_hint text, p_hmac bytea, p_pepper text,
    p_expires_at timestamptz, p_models text[], p_networks cidr[], p_manages boolean,
    p_requests_per_min bigint, p_tokens_per_min bigint, p_calls_in_flight bigint, p_cap_periods text[], p_cap_limits bigint[]
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    owner uuid;
BEGIN
    SELECT w.user_id INTO owner FROM wallets w WHERE w.id = p_wallet AND (p_user IS NULL OR w.user_id = p_user);
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no wallet %', p_wallet USING ERRCODE = 'no_data_found';
    END IF;
    PERFORM lock_user(owner);
    IF (SELECT count(*) FROM api_keys k JOIN wallets w ON w.id = k.wallet_id
        WHERE w.user_id = owner AND k.revoked_at IS NULL AND coalesce(k.expires_at > now(), true)) >= p_most THEN
        RAISE EXCEPTION 'there are % keys already', p_most USING ERRCODE = 'program_limit_exceeded';
    END IF;
    INSERT INTO api_keys (id, wallet_id, name, hint, secret_hmac, pepper, expires_at, models, networks, manages,
                          requests_per_min, tokens_per_min, calls_in_flight)
    VALUES (p_id, p_wallet, p_name, p_hint, p_hmac, p_pepper, p_expires_at, p_models, p_networks, p_manages,
            p_requests_per_min, p_tokens_per_min, p_calls_in_flight);
    IF cardinality(p_cap_periods) > 0 THEN
        PERFORM set_caps('key', p_id, p_user IS NULL, p_cap_periods, p_cap_limits);
    END IF;
END $$;

CREATE OR REPLACE FUNCTION revoke_key(p_key uuid, p_user uuid, p_wallet uuid) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM lock_key(p_key, p_user, p_wallet);
    UPDATE api_keys k SET revoked_at = now(), previous_hmac = NULL, previous_until = NULL
    WHERE k.id = p_key AND k.revoked_at IS NULL;
END $$;

-- Give a key another secret; the one before stays good for the overlap. False: it was revoked, or has expired.
CREATE OR REPLACE FUNCTION rotate_key(
    p_key uuid, p_user uuid, p_wallet uuid, p_hint text, p_hmac bytea, p_pepper text, p_overlap interval
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    k api_keys%ROWTYPE := lock_key(p_key, p_user, p_wallet);
BEGIN
    IF k.revoked_at IS NOT NULL OR k.expires_at <= now() THEN
        RETURN false;
    END IF;
    UPDATE api_keys SET secret_hmac = p_hmac, pepper = p_pepper, hint = p_hint, rotated_at = now(),
           previous_hmac = CASE WHEN p_overlap > interval '0' THEN k.secret_hmac END,
           previous_until = CASE WHEN p_overlap > interval '0' THEN now() + p_overlap END
    WHERE id = p_key;
    RETURN true;
END $$;

-- Keys by age; of one wallet, of one user, or all; after a key, as pages go.
CREATE OR REPLACE FUNCTION list_keys(
    p_key uuid, p_user uuid, p_wallet uuid, p_revoked boolean, p_after uuid, p_limit integer
) RETURNS TABLE (id uuid, wallet_id uuid, user_id uuid, currency text, name text, hint text, pepper text, status text,
                 created_at timestamptz, rotated_at timestamptz, previous_until timestamptz, expires_at timestamptz,
                 revoked_at timestamptz, last_used_at timestamptz, models text[], networks cidr[], manages boolean,
                 requests_per_min bigint, tokens_per_min bigint, calls_in_flight bigint)
LANGUAGE sql STABLE AS $$
    SELECT k.id, k.wallet_id, w.user_id, w.currency, k.name, k.hint, k.pepper,
           CASE WHEN k.revoked_at IS NOT NULL THEN 'revoked' WHEN k.expires_at <= now() THEN 'expired' ELSE 'active' END,
           k.created_at, k.rotated_at, CASE WHEN k.previous_until > now() THEN k.previous_until END, k.expires_at,
           k.revoked_at, k.last_used_at, k.models, k.networks, may_manage(k),
           k.requests_per_min, k.tokens_per_min, k.calls_in_flight
    FROM api_keys k JOIN wallets w ON w.id = k.wallet_id
    WHERE (p_key IS NULL OR k.id = p_key) AND (p_user IS NULL OR w.user_id = p_user) AND (p_wallet IS NULL OR w.id = p_wallet)
      AND (p_revoked OR k.revoked_at IS NULL) AND (p_after IS NULL OR k.id > p_after)
    ORDER BY k.id LIMIT p_limit
$$;

-- A row is written at most once a minute, however busy the key.
CREATE OR REPLACE FUNCTION note_keys_used(p_keys uuid[], p_at timestamptz[]) RETURNS void LANGUAGE sql AS $$
    UPDATE api_keys k SET last_used_at = n.at
    FROM unnest(p_keys, p_at) AS n (key, at)
    WHERE k.id = n.key AND coalesce(k.last_used_at < n.at - interval '1 minute', true)
$$;

-- What people do with their own keys: the functions above, of who is signed in.
CREATE OR REPLACE FUNCTION own_create_key(
    p_id uuid, p_wallet uuid, p_most integer, p_name text, p_hint text, p_hmac bytea, p_pepper text,
    p_expires_at timestamptz, p_models text[], p_networks cidr[], p_manages boolean,
    p_requests_per_min bigint, p_tokens_per_min bigint, p_calls_in_flight bigint, p_cap_periods text[], p_cap_limits bigint[]
) RETURNS void LANGUAGE sql AS $$
    SELECT create_key(p_id, p_wallet, require_person(), p_most, p_name, p_hint, p_hmac, p_pepper, p_expires_at, p_models,
                      p_networks, p_manages, p_requests_per_min, p_tokens_per_min, p_calls_in_flight, p_cap_periods, p_cap_limits)
$$;

CREATE OR REPLACE FUNCTION own_revoke_key(p_key uuid, p_wallet uuid) RETURNS void LANGUAGE sql AS $$
    SELECT revoke_key(p_key, require_person(), p_wallet)
$$;

CREATE OR REPLACE FUNCTION own_rotate_key(p_key uuid, p_wallet uuid, p_hint text, p_hmac bytea, p_pepper text, p_overlap interval)
RETURNS boolean LANGUAGE sql AS $$
    SELECT rotate_key(p_key, require_person(), p_wallet, p_hint, p_hmac, p_pepper, p_overlap)
$$;

CREATE OR REPLACE FUNCTION own_keys(p_key uuid, p_wallet uuid, p_revoked boolean, p_after uuid, p_limit integer)
RETURNS TABLE (id uuid, wallet_id uuid, user_id uuid, currency text, name text, hint text, pepper text, status text,
               created_at timestamptz, rotated_at timestamptz, previous_until timestamptz, expires_at timestamptz,
               revoked_at timestamptz, last_used_at timestamptz, models text[], networks cidr[], manages boolean,
               requests_per_min bigint, tokens_per_min bigint, calls_in_flight bigint)
LANGUAGE sql STABLE AS $$
    SELECT * FROM list_keys(p_key, require_person(), p_wallet, p_revoked, p_after, p_limit)
$$;
