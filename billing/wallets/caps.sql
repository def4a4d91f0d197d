-- Caps: limits on spending per window of a user's clock, on a wallet, a key or a user.
--
-- A window's holds and charges are counted where calls are opened, extended, settled and adjusted, in those same
-- transactions; a call belongs to the window of the moment that its id was minted.

-- The caps that a call is under, with the windows of the moment its id was minted.
CREATE OR REPLACE FUNCTION caps_of_call(p_call uuid, p_user uuid, p_wallet uuid, p_key uuid)
RETURNS TABLE (scope text, scope_id uuid, user_id uuid, period text, effective_nano bigint, starts_at timestamptz, ends_at timestamptz)
LANGUAGE sql STABLE AS $$
    SELECT s.scope, s.scope_id, s.user_id, s.period, s.effective_nano, w.starts_at, w.ends_at
    FROM spending_caps s JOIN users u ON u.id = s.user_id
    CROSS JOIN LATERAL cap_window(s.period, uuid_moment(p_call), u.timezone, u.week_starts) w
    WHERE s.scope_id = ANY (ARRAY[p_user, p_wallet, p_key])
$$;

-- What the calls of a window hold and have spent, from the calls themselves: the live ones by their index, the others
-- through the wallets' entries, as every call that was charged has one.
CREATE OR REPLACE FUNCTION cap_usage(
    p_scope text, p_scope_id uuid, p_starts timestamptz, p_ends timestamptz, OUT held_nano bigint, OUT spent_nano bigint
) LANGUAGE sql STABLE AS $$
    WITH purses AS (
        SELECT w.id FROM wallets w WHERE p_scope = 'wallet' AND w.id = p_scope_id
        UNION ALL
        SELECT w.id FROM wallets w WHERE p_scope = 'user' AND w.user_id = p_scope_id
        UNION ALL
        SELECT k.wallet_id FROM api_keys k WHERE p_scope = 'key' AND k.id = p_scope_id
    ), ids AS (
        SELECT c.id FROM purses p JOIN calls c ON c.wallet_id = p.id AND c.state IN ('open', 'review')
        WHERE c.id >= uuid_floor(p_starts) AND c.id < uuid_floor(p_ends)
        UNION
        SELECT t.call_id FROM purses p
        JOIN journal_entry e ON e.wallet_id = p.id AND e.tx_id >= uuid_floor(p_starts)
        JOIN journal_tx t ON t.id = e.tx_id AND t.call_id >= uuid_floor(p_starts) AND t.call_id < uuid_floor(p_ends)
    )
    SELECT coalesce(sum(CASE WHEN c.state NOT IN ('open', 'review') THEN 0
                             WHEN p_scope = 'user' THEN c.hold_nanousd ELSE c.hold_nano END), 0)::bigint,
           coalesce(sum(CASE WHEN c.state <> 'settled' THEN 0
                             WHEN p_scope = 'user' THEN c.cost_nanousd - c.house_nanousd ELSE c.charge_nano END), 0)::bigint
    FROM ids JOIN calls c ON c.id = ids.id
    WHERE p_scope <> 'key' OR c.key_id = p_scope_id
$$;

-- Make what windows of these calls are missing, then lock all of them, in their order. The wallets are locked before, as
-- everywhere; so a row that is made here says what is committed, and who comes later finds it and adds to it.
CREATE OR REPLACE FUNCTION lock_cap_windows(p_id uuid[], p_user uuid[], p_wallet uuid[], p_key uuid[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO cap_windows (scope_id, period, starts_at, ends_at, user_id, held_nano, spent_nano)
    SELECT n.scope_id, n.period, n.starts_at, n.ends_at, n.user_id, u.held_nano, u.spent_nano
    FROM (SELECT DISTINCT c.scope, c.scope_id, c.period, c.starts_at, c.ends_at, c.user_id
          FROM unnest(p_id, p_user, p_wallet, p_key) AS a (id, user_id, wallet_id, key_id)
          CROSS JOIN LATERAL caps_of_call(a.id, a.user_id, a.wallet_id, a.key_id) c
          WHERE c.period <> 'call' AND NOT EXISTS (
              SELECT FROM cap_windows w WHERE (w.scope_id, w.period, w.starts_at) = (c.scope_id, c.period, c.starts_at))) n
    CROSS JOIN LATERAL cap_usage(n.scope, n.scope_id, n.starts_at, n.ends_at) u
    ORDER BY n.scope_id, n.period, n.starts_at
    ON CONFLICT DO NOTHING;

    PERFORM 1 FROM cap_windows w
    WHERE (w.scope_id, w.period, w.starts_at) IN (
        SELECT c.scope_id, c.period, c.starts_at
        FROM unnest(p_id, p_user, p_wallet, p_key) AS a (id, user_id, wallet_id, key_id)
        CROSS JOIN LATERAL caps_of_call(a.id, a.user_id, a.wallet_id, a.key_id) c)
    ORDER BY w.scope_id, w.period, w.starts_at FOR NO KEY UPDATE;
END $$;

-- Hold more for these calls in every window that they lie in, one after the other; returns those that a cap refuses, for
-- which nothing was counted. p_before is what a call holds already.
CREATE OR REPLACE FUNCTION admit_by_caps(
    p_id uuid[], p_user uuid[], p_wallet uuid[], p_key uuid[],
    p_before bigint[], p_before_usd bigint[], p_more bigint[], p_more_usd bigint[]
) RETURNS uuid[] LANGUAGE plpgsql AS $$
DECLARE
    ask     record;
    refused uuid[] := '{}';
BEGIN
    PERFORM lock_cap_windows(p_id, p_user, p_wallet, p_key);
    FOR ask IN
        SELECT * FROM unnest(p_id, p_user, p_wallet, p_key, p_before, p_before_usd, p_more, p_more_usd)
            WITH ORDINALITY AS a (id, user_id, wallet_id, key_id, before, before_usd, more, more_usd, ord)
        ORDER BY a.ord
    LOOP
        IF EXISTS (
            SELECT FROM caps_of_call(ask.id, ask.user_id, ask.wallet_id, ask.key_id) c
            LEFT JOIN cap_windows w ON (w.scope_id, w.period, w.starts_at) = (c.scope_id, c.period, c.starts_at)
            WHERE c.effective_nano
                  - CASE WHEN c.period <> 'call' THEN w.held_nano + w.spent_nano
                         WHEN c.scope = 'user' THEN ask.before_usd ELSE ask.before END
                  < CASE WHEN c.scope = 'user' THEN ask.more_usd ELSE ask.more END
        ) THEN
            refused := refused || ask.id;
        ELSE
            UPDATE cap_windows w SET held_nano = w.held_nano + CASE WHEN c.scope = 'user' THEN ask.more_usd ELSE ask.more END
            FROM caps_of_call(ask.id, ask.user_id, ask.wallet_id, ask.key_id) c
            WHERE (w.scope_id, w.period, w.starts_at) = (c.scope_id, c.period, c.starts_at);
        END IF;
    END LOOP;
    RETURN refused;
END $$;

-- How much of a cap is spent, as a user is told: 0, 50, 80 or 100 percent.
CREATE OR REPLACE FUNCTION cap_percent(p_spent bigint, p_limit bigint) RETURNS smallint LANGUAGE sql IMMUTABLE AS $$
    SELECT (CASE WHEN p_spent >= p_limit THEN 100
                 WHEN p_spent::numeric * 100 >= p_limit::numeric * 80 THEN 80
                 WHEN p_spent::numeric * 100 >= p_limit::numeric * 50 THEN 50 ELSE 0 END)::smallint
$$;

-- Tell users once per window and threshold how much of these scopes' caps is spent.
CREATE OR REPLACE FUNCTION warn_of_caps(p_scope_id uuid[]) RETURNS void LANGUAGE sql AS $$
    WITH crossed AS (
        UPDATE cap_windows w SET warned = cap_percent(w.spent_nano, s.effective_nano)
        FROM spending_caps s
        WHERE w.scope_id = ANY (p_scope_id) AND s.scope_id = w.scope_id AND s.period = w.period
          AND cap_percent(w.spent_nano, s.effective_nano) > w.warned
        RETURNING w.*, s.scope, s.currency, s.effective_nano
    ), told AS (
        INSERT INTO events (user_id, wallet_id, kind, body)
        SELECT c.user_id, CASE c.scope WHEN 'wallet' THEN c.scope_id WHEN 'key' THEN k.wallet_id END, 'cap.spent',
               jsonb_build_object('scope', c.scope, 'scope_id', c.scope_id, 'period', c.period, 'percent', c.warned,
                                  'limit', major_text(c.effective_nano), 'spent', major_text(c.spent_nano),
                                  'currency', c.currency, 'starts_at', c.starts_at, 'ends_at', c.ends_at)
        FROM crossed c LEFT JOIN api_keys k ON c.scope = 'key' AND k.id = c.scope_id
        ORDER BY c.scope_id, c.period, c.starts_at
        RETURNING id, user_id
    )
    SELECT pg_notify('tuma', 'event:' || t.user_id || ':' || t.id) FROM told t
$$;

-- Move what calls hold and spend in the windows that they lie in; these are locked already.
CREATE OR REPLACE FUNCTION count_by_caps(
    p_id uuid[], p_user uuid[], p_wallet uuid[], p_key uuid[],
    p_held bigint[], p_held_usd bigint[], p_spent bigint[], p_spent_usd bigint[]
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE cap_windows w SET held_nano = w.held_nano + m.held, spent_nano = w.spent_nano + m.spent
    FROM (SELECT c.scope_id, c.period, c.starts_at,
                 sum(CASE WHEN c.scope = 'user' THEN a.held_usd ELSE a.held END)::bigint AS held,
                 sum(CASE WHEN c.scope = 'user' THEN a.spent_usd ELSE a.spent END)::bigint AS spent
          FROM unnest(p_id, p_user, p_wallet, p_key, p_held, p_held_usd, p_spent, p_spent_usd)
               AS a (id, user_id, wallet_id, key_id, held, held_usd, spent, spent_usd)
          CROSS JOIN LATERAL caps_of_call(a.id, a.user_id, a.wallet_id, a.key_id) c
          GROUP BY c.scope_id, c.period, c.starts_at) m
    WHERE (w.scope_id, w.period, w.starts_at) = (m.scope_id, m.period, m.starts_at);
    PERFORM warn_of_caps(p_user || p_wallet || p_key);
END $$;

-- Lock a user with all their wallets, so that no call of theirs changes while a cap or the clock does.
CREATE OR REPLACE FUNCTION lock_user(p_user uuid) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM users u WHERE u.id = p_user FOR NO KEY UPDATE; -- rows that refer to the user may still be written
    PERFORM 1 FROM wallets w WHERE w.user_id = p_user ORDER BY w.id FOR NO KEY UPDATE;
END $$;

-- Count anew what a user's caps need from now on: the windows of now, and of the calls in flight.
CREATE OR REPLACE FUNCTION recount_caps(p_user uuid) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE wallets w SET capped = n.capped
    FROM (SELECT x.id, EXISTS (SELECT FROM spending_caps s LEFT JOIN api_keys k ON k.id = s.scope_id
                               WHERE s.user_id = p_user AND (s.scope = 'user' OR x.id IN (s.scope_id, k.wallet_id))) AS capped
          FROM wallets x WHERE x.user_id = p_user) n
    WHERE w.id = n.id AND w.capped <> n.capped;

    PERFORM lock_cap_windows(array_agg(a.id), array_agg(a.scope_id), array_agg(NULL::uuid), array_agg(NULL::uuid))
    FROM (SELECT m.id, s.scope_id
          FROM (SELECT uuid_floor(clock_timestamp()) AS id
                UNION ALL
                SELECT c.id FROM calls c JOIN wallets w ON w.id = c.wallet_id
                WHERE w.user_id = p_user AND c.state IN ('open', 'review')) m
          CROSS JOIN (SELECT DISTINCT scope_id FROM spending_caps WHERE user_id = p_user) s) a
    HAVING count(*) > 0;
    -- What is known when a cap is set is no news.
    UPDATE cap_windows w SET warned = cap_percent(w.spent_nano, s.effective_nano)
    FROM spending_caps s WHERE s.user_id = p_user AND w.scope_id = s.scope_id AND w.period = s.period;
    PERFORM pg_notify('tuma', 'user:' || p_user);
END $$;

-- Set, change or lift (NULL) the caps of a wallet, a key or a user, by the user or by an operator.
CREATE OR REPLACE FUNCTION set_caps(p_scope text, p_scope_id uuid, p_by_operator boolean, p_period text[], p_limit bigint[])
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    owner uuid;
    coin  text;
BEGIN
    SELECT f.user_id, f.currency INTO owner, coin FROM (
        SELECT w.user_id, w.currency FROM wallets w WHERE p_scope = 'wallet' AND w.id = p_scope_id
        UNION ALL
        SELECT w.user_id, w.currency FROM api_keys k JOIN wallets w ON w.id = k.wallet_id WHERE p_scope = 'key' AND k.id = p_scope_id
        UNION ALL
        SELECT u.id, 'USD' FROM users u WHERE p_scope = 'user' AND u.id = p_scope_id
    ) f;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no % %', p_scope, p_scope_id USING ERRCODE = 'no_data_found';
    END IF;
    PERFORM lock_user(owner);

    INSERT INTO spending_caps AS s (scope, scope_id, period, user_id, currency, limit_nano, ceiling_nano)
    SELECT p_scope, p_scope_id, a.period, owner, coin,
           CASE WHEN NOT p_by_operator THEN a.amount END, CASE WHEN p_by_operator THEN a.amount END
    FROM unnest(p_period, p_limit) AS a (period, amount) WHERE a.amount IS NOT NULL
    ON CONFLICT (scope_id, period) DO UPDATE SET updated_at = now(),
        limit_nano = CASE WHEN p_by_operator THEN s.limit_nano ELSE excluded.limit_nano END,
        ceiling_nano = CASE WHEN p_by_operator THEN excluded.ceiling_nano ELSE s.ceiling_nano END;
    DELETE FROM spending_caps s USING unnest(p_period, p_limit) AS a (period, amount)
    WHERE s.scope_id = p_scope_id AND s.period = a.period AND a.amount IS NULL
      AND CASE WHEN p_by_operator THEN s.limit_nano ELSE s.ceiling_nano END IS NULL;
    UPDATE spending_caps s SET updated_at = now(),
           limit_nano = CASE WHEN p_by_operator THEN s.limit_nano END,
           ceiling_nano = CASE WHEN NOT p_by_operator THEN s.ceiling_nano END
    FROM unnest(p_period, p_limit) AS a (period, amount)
    WHERE s.scope_id = p_scope_id AND s.period = a.period AND a.amount IS NULL;
    DELETE FROM cap_windows w WHERE w.scope_id = p_scope_id
      AND NOT EXISTS (SELECT FROM spending_caps s WHERE s.scope_id = w.scope_id AND s.period = w.period);

    PERFORM recount_caps(owner);
END $$;

-- Set a user's time zone and the day that their weeks start with; their windows are counted anew.
CREATE OR REPLACE FUNCTION set_clock(p_user uuid, p_zone text, p_week_starts integer) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_timezone_names z WHERE z.name = p_zone) THEN
        RAISE EXCEPTION 'there is no time zone %', p_zone USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM lock_user(p_user);
    UPDATE users u SET timezone = p_zone, week_starts = p_week_starts WHERE u.id = p_user;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no user %', p_user USING ERRCODE = 'no_data_found';
    END IF;
    DELETE FROM cap_windows w WHERE w.user_id = p_user AND w.period <> 'total';
    PERFORM recount_caps(p_user);
END $$;

-- A wallet that is made for a user under a cap is under it, too.
CREATE OR REPLACE FUNCTION cap_new_wallet() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM users u WHERE u.id = NEW.user_id FOR SHARE; -- no cap of the user's is being set
    NEW.capped := EXISTS (SELECT FROM spending_caps s WHERE s.scope = 'user' AND s.scope_id = NEW.user_id);
    RETURN NEW;
END $$;

-- Rows of windows long past: what a late settlement needs of them is counted anew.
CREATE OR REPLACE FUNCTION forget_cap_windows(p_age interval) RETURNS bigint LANGUAGE sql AS $$
    WITH gone AS (DELETE FROM cap_windows w WHERE w.ends_at < now() - p_age RETURNING 1) SELECT count(*) FROM gone
$$;

-- The caps of a scope as they stand at a moment.
CREATE OR REPLACE FUNCTION list_caps(p_scope_id uuid[], p_moment timestamptz)
RETURNS TABLE (scope text, scope_id uuid, period text, currency text, limit_nano bigint, ceiling_nano bigint, effective_nano bigint,
               starts_at timestamptz, ends_at timestamptz, held_nano bigint, spent_nano bigint)
LANGUAGE sql STABLE AS $$
    SELECT s.scope, s.scope_id, s.period, s.currency, s.limit_nano, s.ceiling_nano, s.effective_nano, c.starts_at, c.ends_at,
           coalesce(w.held_nano, u.held_nano, 0), coalesce(w.spent_nano, u.spent_nano, 0)
    FROM spending_caps s JOIN users o ON o.id = s.user_id
    CROSS JOIN LATERAL cap_window(s.period, p_moment, o.timezone, o.week_starts) c
    LEFT JOIN cap_windows w ON (w.scope_id, w.period, w.starts_at) = (s.scope_id, s.period, c.starts_at)
    LEFT JOIN LATERAL (SELECT * FROM cap_usage(s.scope, s.scope_id, c.starts_at, c.ends_at)
                       WHERE w.scope_id IS NULL AND s.period <> 'call') u ON true
    WHERE s.scope_id = ANY (p_scope_id)
$$;

-- The limits of one's own wallet or key, beside the operator's ceilings.
CREATE OR REPLACE FUNCTION own_set_caps(p_scope text, p_scope_id uuid, p_period text[], p_limit bigint[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM wallets w LEFT JOIN api_keys k ON k.wallet_id = w.id AND p_scope = 'key'
                   WHERE w.user_id = require_person() AND p_scope IN ('wallet', 'key')
                     AND p_scope_id = CASE p_scope WHEN 'wallet' THEN w.id ELSE k.id END) THEN
        RAISE EXCEPTION 'no % %', p_scope, p_scope_id USING ERRCODE = 'no_data_found';
    END IF;
    PERFORM set_caps(p_scope, p_scope_id, false, p_period, p_limit);
END $$;

CREATE OR REPLACE FUNCTION own_caps(p_scope_id uuid[], p_moment timestamptz)
RETURNS TABLE (scope text, scope_id uuid, period text, currency text, limit_nano bigint, ceiling_nano bigint, effective_nano bigint,
               starts_at timestamptz, ends_at timestamptz, held_nano bigint, spent_nano bigint)
LANGUAGE sql STABLE AS $$
    SELECT l.scope, l.scope_id, l.period, l.currency, l.limit_nano, l.ceiling_nano, l.effective_nano, l.starts_at, l.ends_at,
           l.held_nano, l.spent_nano
    FROM list_caps(ARRAY(SELECT DISTINCT s.scope_id FROM spending_caps s
                         WHERE s.scope_id = ANY (p_scope_id) AND s.user_id = require_person()), p_moment) l
$$;
