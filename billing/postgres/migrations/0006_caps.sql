-- Caps: limits on spending per window of a user's clock, on a wallet, a key or a user. A window's holds and charges are
-- counted where calls are opened, extended, settled and adjusted, in those same transactions; a call belongs to the
-- window of the moment that its id was minted.

ALTER TABLE users
    ADD COLUMN timezone         text NOT NULL DEFAULT 'UTC', -- an IANA name
    ADD COLUMN week_starts      smallint NOT NULL DEFAULT 1 CHECK (week_starts BETWEEN 1 AND 7), -- ISO 8601: 1 is Monday
    ADD COLUMN requests_per_min bigint CHECK (requests_per_min > 0),
    ADD COLUMN tokens_per_min   bigint CHECK (tokens_per_min > 0),
    ADD COLUMN calls_in_flight  bigint CHECK (calls_in_flight > 0);
-- Whether any cap is set on the wallet, one of its keys or its user: calls of other wallets pay nothing for caps.
ALTER TABLE wallets ADD COLUMN capped boolean NOT NULL DEFAULT false;

CREATE TABLE spending_caps (
    scope          text NOT NULL CHECK (scope IN ('wallet', 'key', 'user')),
    scope_id       uuid NOT NULL,
    period         text NOT NULL CHECK (period IN ('call', 'day', 'week', 'month', 'total')),
    user_id        uuid NOT NULL REFERENCES users,
    currency       text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'), -- the wallet's; USD for a user, whose wallets may differ
    limit_nano     bigint CHECK (limit_nano >= 0),   -- what the user set
    ceiling_nano   bigint CHECK (ceiling_nano >= 0), -- what the operator set; the user cannot lift it
    effective_nano bigint NOT NULL GENERATED ALWAYS AS (least(limit_nano, ceiling_nano)) STORED,
    updated_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (scope_id, period)
);
CREATE INDEX spending_caps_user ON spending_caps (user_id);

-- A user's cap counts USD of cost that their wallets paid for; the others count charges in the wallet's currency.
-- A window without a row has what its calls say (cap_usage); the row is made before the first of them changes.
CREATE TABLE cap_windows (
    scope_id   uuid NOT NULL,
    period     text NOT NULL,
    starts_at  timestamptz NOT NULL,
    ends_at    timestamptz NOT NULL,
    user_id    uuid NOT NULL,
    held_nano  bigint NOT NULL,
    spent_nano bigint NOT NULL,
    warned     smallint NOT NULL DEFAULT 0, -- percent of the cap that the user was told of
    PRIMARY KEY (scope_id, period, starts_at)
) WITH (fillfactor = 50);
CREATE INDEX cap_windows_end ON cap_windows (ends_at);

-- What a user is told, in order.
CREATE TABLE events (
    id         bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    user_id    uuid NOT NULL REFERENCES users,
    wallet_id  uuid,
    kind       text NOT NULL,
    body       jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX events_user ON events (user_id, id);

-- The first moment at which the zone's clocks show this time; where they skip it, the moment that they skip it.
-- (Postgres itself takes the later of two such moments, PostgreSQL documentation, appendix B.2.)
CREATE FUNCTION clock_moment(p_local timestamp, p_zone text) RETURNS timestamptz LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN early.at AT TIME ZONE p_zone = p_local THEN least(early.at, late.at) ELSE late.at END
    FROM (SELECT p_local AT TIME ZONE p_zone AS at) late
    CROSS JOIN LATERAL (
        SELECT late.at - interval '6 hours' AS before
    ) hours
    CROSS JOIN LATERAL (
        SELECT (p_local - (hours.before AT TIME ZONE p_zone - hours.before AT TIME ZONE 'UTC')) AT TIME ZONE 'UTC' AS at
    ) early
$$;

-- The window of a period that a moment lies in. `call` and `total` have no ends.
CREATE FUNCTION cap_window(
    p_period text, p_moment timestamptz, p_zone text, p_week_starts integer,
    OUT starts_at timestamptz, OUT ends_at timestamptz
) LANGUAGE plpgsql STABLE AS $$
DECLARE
    clock timestamp := p_moment AT TIME ZONE p_zone;
    first timestamp;
    step  interval;
BEGIN
    CASE p_period
        WHEN 'day' THEN
            first := date_trunc('day', clock);
            step := '1 day';
        WHEN 'week' THEN
            first := date_trunc('day', clock) - make_interval(days => (extract(isodow FROM clock)::integer - p_week_starts + 7) % 7);
            step := '7 days';
        WHEN 'month' THEN
            first := date_trunc('month', clock);
            step := '1 month';
        ELSE
            starts_at := 'epoch';
            ends_at := '9999-12-31T00:00:00Z';
            RETURN;
    END CASE;
    starts_at := clock_moment(first, p_zone);
    ends_at := clock_moment(first + step, p_zone);
    -- Clocks that are set back over midnight show the day before once more: the new window has begun all the same.
    WHILE p_moment >= ends_at LOOP
        first := first + step;
        starts_at := ends_at;
        ends_at := clock_moment(first + step, p_zone);
    END LOOP;
END $$;

-- The caps that a call is under, with the windows of the moment its id was minted.
CREATE FUNCTION caps_of_call(p_call uuid, p_user uuid, p_wallet uuid, p_key uuid)
RETURNS TABLE (scope text, scope_id uuid, user_id uuid, period text, effective_nano bigint, starts_at timestamptz, ends_at timestamptz)
LANGUAGE sql STABLE AS $$
    SELECT s.scope, s.scope_id, s.user_id, s.period, s.effective_nano, w.starts_at, w.ends_at
    FROM spending_caps s JOIN users u ON u.id = s.user_id
    CROSS JOIN LATERAL cap_window(s.period, uuid_moment(p_call), u.timezone, u.week_starts) w
    WHERE s.scope_id = ANY (ARRAY[p_user, p_wallet, p_key])
$$;

-- What the calls of a window hold and have spent, from the calls themselves: the live ones by their index, the others
-- through the wallets' entries, as every call that was charged has one.
CREATE FUNCTION cap_usage(
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
CREATE FUNCTION lock_cap_windows(p_id uuid[], p_user uuid[], p_wallet uuid[], p_key uuid[]) RETURNS void LANGUAGE plpgsql AS $$
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
CREATE FUNCTION admit_by_caps(
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

CREATE FUNCTION cap_percent(p_spent bigint, p_limit bigint) RETURNS smallint LANGUAGE sql IMMUTABLE AS $$
    SELECT (CASE WHEN p_spent >= p_limit THEN 100
                 WHEN p_spent::numeric * 100 >= p_limit::numeric * 80 THEN 80
                 WHEN p_spent::numeric * 100 >= p_limit::numeric * 50 THEN 50 ELSE 0 END)::smallint
$$;

CREATE FUNCTION major_text(p_nano bigint) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT trim_scale(p_nano::numeric / 1000000000)::text
$$;

-- Tell users once per window and threshold how much of these scopes' caps is spent.
CREATE FUNCTION warn_of_caps(p_scope_id uuid[]) RETURNS void LANGUAGE sql AS $$
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
CREATE FUNCTION count_by_caps(
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
CREATE FUNCTION lock_user(p_user uuid) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM users u WHERE u.id = p_user FOR NO KEY UPDATE; -- rows that refer to the user may still be written
    PERFORM 1 FROM wallets w WHERE w.user_id = p_user ORDER BY w.id FOR NO KEY UPDATE;
END $$;

-- Count anew what a user's caps need from now on: the windows of now, and of the calls in flight.
CREATE FUNCTION recount_caps(p_user uuid) RETURNS void LANGUAGE plpgsql AS $$
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
CREATE FUNCTION set_caps(p_scope text, p_scope_id uuid, p_by_operator boolean, p_period text[], p_limit bigint[])
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
CREATE FUNCTION set_clock(p_user uuid, p_zone text, p_week_starts integer) RETURNS void LANGUAGE plpgsql AS $$
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

CREATE FUNCTION cap_new_wallet() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM users u WHERE u.id = NEW.user_id FOR SHARE; -- no cap of the user's is being set
    NEW.capped := EXISTS (SELECT FROM spending_caps s WHERE s.scope = 'user' AND s.scope_id = NEW.user_id);
    RETURN NEW;
END $$;
CREATE TRIGGER wallets_capped BEFORE INSERT ON wallets FOR EACH ROW EXECUTE FUNCTION cap_new_wallet();

-- Rows of windows long past: what a late settlement needs of them is counted anew.
CREATE FUNCTION forget_cap_windows(p_age interval) RETURNS bigint LANGUAGE sql AS $$
    WITH gone AS (DELETE FROM cap_windows w WHERE w.ends_at < now() - p_age RETURNING 1) SELECT count(*) FROM gone
$$;

-- The caps of a scope as they stand at a moment.
CREATE FUNCTION list_caps(p_scope_id uuid[], p_moment timestamptz)
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

-- Everything that Redis admits a user's calls by, as fields of their mirror, from one snapshot: see `billing/holds.py`.
CREATE FUNCTION read_mirror(p_user uuid, p_moment timestamptz) RETURNS TABLE (field text, value text) LANGUAGE sql STABLE AS $$
    WITH purses AS (
        SELECT w.* FROM wallets w WHERE w.user_id = p_user
    ), live AS (
        SELECT c.id, c.hold_nano, c.hold_nanousd
        FROM purses w JOIN calls c ON c.wallet_id = w.id AND c.state IN ('open', 'review')
    ), caps AS (
        SELECT l.* FROM list_caps(ARRAY(SELECT DISTINCT s.scope_id FROM spending_caps s WHERE s.user_id = p_user), p_moment) l
    )
    SELECT 'available:' || w.id, (w.posted_nano + w.overdraft_nano - w.held_nano)::text FROM purses w
    UNION ALL
    SELECT 'frozen:' || w.id, '1' FROM purses w WHERE w.status = 'frozen'
    UNION ALL
    SELECT 'hold:' || l.id, l.hold_nano::text FROM live l
    UNION ALL
    SELECT 'usd:' || l.id, l.hold_nanousd::text FROM live l WHERE EXISTS (SELECT FROM caps)
    UNION ALL
    SELECT 'capped', '1' WHERE EXISTS (SELECT FROM caps)
    UNION ALL
    SELECT 'caps:' || c.scope_id, string_agg(concat_ws(':', c.period, (extract(epoch FROM c.starts_at) * 1000)::bigint,
                                                       (extract(epoch FROM c.ends_at) * 1000)::bigint, c.effective_nano), ' ' ORDER BY c.period)
    FROM caps c GROUP BY c.scope_id
    UNION ALL
    SELECT concat_ws(':', 'left', c.scope_id, c.period), (c.effective_nano - c.held_nano - c.spent_nano)::text FROM caps c
$$;

-- How calls that shall be opened stand, in their order: what is decided of them (NULL: the funds decide), and what would
-- be available after them and all before them.
CREATE FUNCTION judge_openings(p_id uuid[], p_wallet uuid[], p_hold bigint[])
RETURNS TABLE (ord bigint, id uuid, known text, decided text, available_after bigint, currency text, capped boolean)
LANGUAGE sql STABLE AS $$
    SELECT a.ord, a.id, c.state,
           CASE WHEN c.state IS NOT NULL THEN CASE c.state WHEN 'open' THEN 'opened' ELSE c.state END
                WHEN a.hold = 0 THEN 'house'
                WHEN w.status <> 'active' THEN 'wallet_frozen' END,
           (w.posted_nano + w.overdraft_nano - w.held_nano
               - sum(CASE WHEN c.state IS NULL THEN a.hold ELSE 0 END) OVER (PARTITION BY a.wallet_id ORDER BY a.ord))::bigint,
           w.currency, w.capped
    FROM unnest(p_id, p_wallet, p_hold) WITH ORDINALITY AS a (id, wallet_id, hold, ord)
    LEFT JOIN calls c ON c.id = a.id
    JOIN wallets w ON w.id = a.wallet_id
$$;

-- As before, and 'cap_exceeded': a cap refuses the hold; nothing was written.
CREATE OR REPLACE FUNCTION open_batch(
    p_worker uuid, p_id uuid[], p_user uuid[], p_wallet uuid[], p_key uuid[], p_model text[], p_stream boolean[],
    p_price uuid[], p_fx uuid[], p_hold bigint[], p_hold_usd bigint[]
) RETURNS TABLE (call_id uuid, verdict text) LANGUAGE plpgsql AS $$
DECLARE
    any_capped boolean;
    refused    uuid[] := '{}';
BEGIN
    SELECT bool_or(l.capped) INTO any_capped
    FROM (SELECT w.capped FROM wallets w WHERE w.id = ANY (p_wallet) ORDER BY w.id FOR NO KEY UPDATE) l;

    IF any_capped THEN
        SELECT coalesce(admit_by_caps(
            array_agg(j.id ORDER BY j.ord), array_agg(a.user_id ORDER BY j.ord), array_agg(a.wallet_id ORDER BY j.ord),
            array_agg(a.key_id ORDER BY j.ord), array_agg(0::bigint), array_agg(0::bigint),
            array_agg(a.hold ORDER BY j.ord), array_agg(a.hold_usd ORDER BY j.ord)), '{}') INTO refused
        FROM judge_openings(p_id, p_wallet, p_hold) j
        JOIN unnest(p_user, p_wallet, p_key, p_hold, p_hold_usd)
             WITH ORDINALITY AS a (user_id, wallet_id, key_id, hold, hold_usd, ord) USING (ord)
        WHERE j.capped AND j.decided IS NULL AND j.available_after >= 0
        HAVING count(*) > 0;
        refused := coalesce(refused, '{}');
    END IF;

    RETURN QUERY
    WITH judged AS (
        SELECT a.*, j.currency, j.available_after,
               CASE WHEN a.id = ANY (refused) THEN 'cap_exceeded' ELSE j.decided END AS decided
        FROM unnest(p_id, p_user, p_wallet, p_key, p_model, p_stream, p_price, p_fx, p_hold, p_hold_usd)
             WITH ORDINALITY AS a (id, user_id, wallet_id, key_id, model, stream, price_id, fx_id, hold, hold_usd, ord)
        JOIN judge_openings(p_id, p_wallet, p_hold) j ON j.ord = a.ord
    ), opened AS (
        INSERT INTO calls (id, user_id, wallet_id, key_id, worker_id, model, stream, price_id, fx_quote_id, currency,
                           hold_nano, hold_nanousd, available_after_nano)
        SELECT j.id, j.user_id, j.wallet_id, j.key_id, p_worker, j.model, j.stream, j.price_id, j.fx_id, j.currency,
               j.hold, j.hold_usd, CASE WHEN j.hold > 0 THEN j.available_after END
        FROM judged j WHERE j.decided = 'house' OR (j.decided IS NULL AND j.available_after >= 0)
        RETURNING id, wallet_id, hold_nano
    ), held AS (
        UPDATE wallets w SET held_nano = w.held_nano + s.amount
        FROM (SELECT o.wallet_id, sum(o.hold_nano)::bigint AS amount FROM opened o GROUP BY o.wallet_id) s
        WHERE w.id = s.wallet_id AND s.amount > 0
    )
    SELECT j.id, CASE WHEN o.id IS NOT NULL THEN 'opened' ELSE coalesce(j.decided, 'insufficient_funds') END
    FROM judged j LEFT JOIN opened o ON o.id = j.id;
END $$;

-- How extensions stand, in their order: how much more they hold, and what would be available after them.
CREATE FUNCTION judge_extensions(p_id uuid[], p_hold bigint[], p_hold_usd bigint[])
RETURNS TABLE (ord bigint, id uuid, user_id uuid, wallet_id uuid, key_id uuid, state text, hold bigint, hold_usd bigint,
               more bigint, more_usd bigint, available_after bigint, capped boolean)
LANGUAGE sql STABLE AS $$
    SELECT a.ord, a.id, c.user_id, c.wallet_id, c.key_id, c.state, a.hold, a.hold_usd,
           greatest(a.hold - c.hold_nano, 0), greatest(a.hold_usd - c.hold_nanousd, 0),
           (w.posted_nano + w.overdraft_nano - w.held_nano
               - sum(greatest(a.hold - c.hold_nano, 0)) OVER (PARTITION BY c.wallet_id ORDER BY a.ord))::bigint,
           w.capped
    FROM unnest(p_id, p_hold, p_hold_usd) WITH ORDINALITY AS a (id, hold, hold_usd, ord)
    JOIN calls c ON c.id = a.id JOIN wallets w ON w.id = c.wallet_id
$$;

CREATE OR REPLACE FUNCTION extend_batch(p_id uuid[], p_hold bigint[], p_hold_usd bigint[])
RETURNS TABLE (call_id uuid, verdict text) LANGUAGE plpgsql AS $$
DECLARE
    any_capped boolean;
    refused    uuid[] := '{}';
BEGIN
    SELECT bool_or(l.capped) INTO any_capped
    FROM (SELECT w.capped FROM wallets w
          WHERE w.id IN (SELECT c.wallet_id FROM calls c WHERE c.id = ANY (p_id)) ORDER BY w.id FOR NO KEY UPDATE) l;

    IF any_capped THEN
        SELECT admit_by_caps(
            array_agg(j.id ORDER BY j.ord), array_agg(j.user_id ORDER BY j.ord), array_agg(j.wallet_id ORDER BY j.ord),
            array_agg(j.key_id ORDER BY j.ord), array_agg(j.hold - j.more ORDER BY j.ord),
            array_agg(j.hold_usd - j.more_usd ORDER BY j.ord), array_agg(j.more ORDER BY j.ord),
            array_agg(j.more_usd ORDER BY j.ord)) INTO refused
        FROM judge_extensions(p_id, p_hold, p_hold_usd) j
        WHERE j.capped AND j.state = 'open' AND (j.more > 0 OR j.more_usd > 0) AND (j.more = 0 OR j.available_after >= 0)
        HAVING count(*) > 0;
        refused := coalesce(refused, '{}');
    END IF;

    RETURN QUERY
    WITH ask AS (
        SELECT j.* FROM judge_extensions(p_id, p_hold, p_hold_usd) j
    ), extended AS (
        UPDATE calls c SET hold_nano = greatest(c.hold_nano, a.hold), hold_nanousd = greatest(c.hold_nanousd, a.hold_usd)
        FROM ask a WHERE c.id = a.id AND a.state = 'open' AND c.state = 'open' AND (a.more = 0 OR a.available_after >= 0)
                     AND NOT a.id = ANY (refused)
        RETURNING c.id, a.wallet_id, a.more
    ), held AS (
        UPDATE wallets w SET held_nano = w.held_nano + s.amount
        FROM (SELECT x.wallet_id, sum(x.more)::bigint AS amount FROM extended x GROUP BY x.wallet_id) s
        WHERE w.id = s.wallet_id AND s.amount > 0
    )
    SELECT a.id, CASE WHEN x.id IS NOT NULL THEN 'extended' WHEN a.state <> 'open' THEN a.state
                      WHEN a.id = ANY (refused) THEN 'cap_exceeded' ELSE 'insufficient_funds' END
    FROM ask a LEFT JOIN extended x ON x.id = a.id;
END $$;

-- As in 0005, and every window that the calls lie in is kept.
CREATE OR REPLACE FUNCTION settle_batch(
    p_batch uuid, p_id uuid[], p_state text[], p_outcome text[], p_accuracy text[], p_source text[], p_generation text[],
    p_cost bigint[], p_provider_cost bigint[], p_charge bigint[], p_spread bigint[], p_house bigint[],
    p_prompt bigint[], p_completion bigint[], p_cached_read bigint[], p_cached_write bigint[], p_reasoning bigint[],
    p_first_byte_ms integer[], p_duration_ms integer[]
) RETURNS TABLE (call_id uuid, won boolean, state text, charge_nano bigint, hold_nano bigint, posted_nano bigint, available_nano bigint)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    winners    uuid[];
    late       uuid[];
    any_capped boolean;
BEGIN
    SELECT bool_or(l.capped) INTO any_capped
    FROM (SELECT w.capped FROM wallets w
          WHERE w.id IN (SELECT c.wallet_id FROM calls c WHERE c.id = ANY (p_id)) ORDER BY w.id FOR NO KEY UPDATE) l;
    IF any_capped THEN -- before anything changes, so that a window that is made now is counted as things were
        PERFORM lock_cap_windows(array_agg(c.id), array_agg(c.user_id), array_agg(c.wallet_id), array_agg(c.key_id))
        FROM calls c JOIN wallets w ON w.id = c.wallet_id
        WHERE c.id = ANY (p_id) AND c.state IN ('open', 'review') AND w.capped
        HAVING count(*) > 0;
    END IF;

    -- The guard: only a live call can end, and the update decides who ended it.
    WITH ends AS (
        SELECT DISTINCT ON (e.id) e.*
        FROM unnest(p_id, p_state, p_outcome, p_accuracy, p_generation, p_cost, p_provider_cost, p_charge, p_spread,
                    p_house)
             AS e (id, state, outcome, accuracy, generation, cost, provider_cost, charge, spread, house)
    ), ended AS (
        UPDATE calls c SET state = e.state, outcome = e.outcome, ended_at = now(),
               generation_id = coalesce(e.generation, c.generation_id), accuracy = e.accuracy,
               cost_nanousd = e.cost, provider_cost_nanousd = e.provider_cost, charge_nano = e.charge, spread_nano = e.spread,
               house_nanousd = e.house
        FROM ends e
        WHERE c.id = e.id AND (c.state = 'open' OR (c.state = 'review' AND e.state <> 'review'))
        RETURNING c.id
    )
    SELECT coalesce(array_agg(ended.id), '{}') INTO winners FROM ended;

    IF cardinality(winners) > 0 THEN
        UPDATE wallets w SET held_nano = w.held_nano - s.amount
        FROM (SELECT c.wallet_id, sum(c.hold_nano)::bigint AS amount FROM calls c
              WHERE c.id = ANY (winners) AND c.state IN ('settled', 'void') GROUP BY c.wallet_id) s
        WHERE w.id = s.wallet_id;

        IF any_capped THEN
            PERFORM count_by_caps(
                array_agg(c.id), array_agg(c.user_id), array_agg(c.wallet_id), array_agg(c.key_id), array_agg(-c.hold_nano),
                array_agg(-c.hold_nanousd), array_agg(c.charge_nano), array_agg(c.cost_nanousd - c.house_nanousd))
            FROM calls c JOIN wallets w ON w.id = c.wallet_id
            WHERE c.id = ANY (winners) AND c.state IN ('settled', 'void') AND w.capped
            HAVING count(*) > 0;
        END IF;

        INSERT INTO usage (call_id, source, prompt_tokens, completion_tokens, cached_read_tokens, cached_write_tokens,
                           reasoning_tokens, first_byte_ms, duration_ms)
        SELECT DISTINCT ON (u.id) u.*
        FROM unnest(p_id, p_source, p_prompt, p_completion, p_cached_read, p_cached_write, p_reasoning,
                    p_first_byte_ms, p_duration_ms)
             AS u (id, source, prompt, completion, cached_read, cached_write, reasoning, first_byte_ms, duration_ms)
        JOIN calls c ON c.id = u.id
        WHERE u.id = ANY (winners) AND c.state = 'settled';

        INSERT INTO journal_tx (id, kind, call_id, wallet_id)
        SELECT c.id, 'settlement', c.id, c.wallet_id FROM calls c
        WHERE c.id = ANY (winners) AND c.state = 'settled' AND (c.cost_nanousd > 0 OR c.charge_nano > 0);

        -- The wallet pays the charge; what is not markup goes through the fx position and arrives as revenue in USD;
        -- what the provider bills is taken from the prepaid account as cost.
        PERFORM post_entries(array_agg(l.tx), array_agg(l.seq), array_agg(l.account), array_agg(l.wallet),
                             array_agg(l.currency), array_agg(l.amount))
        FROM (
            SELECT c.id AS tx, e.seq::smallint AS seq, e.account, e.wallet, e.currency, e.amount
            FROM calls c
            CROSS JOIN LATERAL (VALUES
                (1, 'wallet', c.wallet_id, c.currency, -c.charge_nano),
                (2, 'fx_position', NULL, c.currency, c.charge_nano - c.spread_nano),
                (3, 'fx_spread', NULL, c.currency, c.spread_nano),
                (4, 'fx_position', NULL, 'USD', -(c.cost_nanousd - c.house_nanousd)),
                (5, 'house_loss', NULL, 'USD', -c.house_nanousd),
                (6, 'revenue', NULL, 'USD', c.cost_nanousd),
                (7, 'provider_cost', NULL, 'USD', -c.cost_nanousd),
                (8, 'provider_prepaid', NULL, 'USD', c.cost_nanousd)
            ) AS e (seq, account, wallet, currency, amount)
            WHERE c.id = ANY (winners) AND c.state = 'settled' AND e.amount <> 0
        ) l
        HAVING count(*) > 0;

        INSERT INTO shadow_usd_ledger (id, kind, amount_nanousd, calls)
        SELECT p_batch, 'settlement', sum(c.cost_nanousd)::bigint, count(*)::integer FROM calls c
        WHERE c.id = ANY (winners) AND c.state = 'settled'
        HAVING count(*) > 0;

        INSERT INTO quota_slabs (worker_id, spent_nanousd)
        SELECT c.worker_id, sum(c.cost_nanousd)::bigint FROM calls c
        WHERE c.id = ANY (winners) AND c.state = 'settled' AND c.cost_nanousd > 0 GROUP BY c.worker_id
        ON CONFLICT (worker_id) DO UPDATE SET spent_nanousd = quota_slabs.spent_nanousd + excluded.spent_nanousd;

        late := find_verified(winners);
        IF late IS NOT NULL THEN
            INSERT INTO late_postings (settled_nanousd) SELECT c.cost_nanousd FROM calls c
            WHERE c.id = ANY (late) AND c.state = 'settled' AND c.cost_nanousd > 0;
        END IF;
    END IF;

    RETURN QUERY
    SELECT c.id, c.id = ANY (winners), c.state, coalesce(c.charge_nano, 0), c.hold_nano, w.posted_nano,
           w.posted_nano + w.overdraft_nano - w.held_nano
    FROM calls c JOIN wallets w ON w.id = c.wallet_id WHERE c.id = ANY (p_id);
END $$;

CREATE OR REPLACE FUNCTION adjust_call(
    p_tx uuid, p_call uuid, p_kind text, p_memo text, p_key text, p_hash bytea,
    p_seen_cost bigint, p_seen_charge bigint,
    p_cost bigint, p_provider_cost bigint, p_charge bigint, p_spread bigint, p_house bigint, p_accuracy text,
    p_generation text
) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    call  calls%ROWTYPE;
    first record;
    owner uuid;
    under boolean; -- caps
BEGIN
    SELECT c.wallet_id INTO owner FROM calls c WHERE c.id = p_call;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no call %', p_call USING ERRCODE = 'no_data_found';
    END IF;
    SELECT w.capped INTO under FROM wallets w WHERE w.id = owner FOR NO KEY UPDATE; -- the wallet first, as every posting does
    SELECT * INTO call FROM calls c WHERE c.id = p_call FOR UPDATE;

    SELECT k.input_hash INTO first FROM posting_keys k WHERE k.key = p_key;
    IF FOUND THEN
        IF first.input_hash <> p_hash THEN
            RAISE EXCEPTION 'idempotency key % was used with another input', p_key USING ERRCODE = 'unique_violation';
        END IF;
        RETURN 'repeated';
    END IF;
    IF call.state NOT IN ('settled', 'void') OR call.cost_nanousd <> p_seen_cost OR call.charge_nano <> p_seen_charge THEN
        RETURN 'stale';
    END IF;

    IF under THEN
        PERFORM lock_cap_windows(ARRAY[p_call], ARRAY[call.user_id], ARRAY[call.wallet_id], ARRAY[call.key_id]);
    END IF;
    INSERT INTO posting_keys (key, input_hash, tx_id) VALUES (p_key, p_hash, p_tx);
    INSERT INTO journal_tx (id, kind, call_id, wallet_id, memo) VALUES (p_tx, p_kind, p_call, call.wallet_id, p_memo);
    PERFORM post_entries(array_agg(p_tx), array_agg(e.seq::smallint), array_agg(e.account), array_agg(e.wallet),
                         array_agg(e.currency), array_agg(e.amount))
    FROM (VALUES
        (1, 'wallet', call.wallet_id, call.currency, -(p_charge - call.charge_nano)),
        (2, 'fx_position', NULL, call.currency, (p_charge - p_spread) - (call.charge_nano - call.spread_nano)),
        (3, 'fx_spread', NULL, call.currency, p_spread - call.spread_nano),
        (4, 'fx_position', NULL, 'USD', -((p_cost - p_house) - (call.cost_nanousd - call.house_nanousd))),
        (5, 'house_loss', NULL, 'USD', -(p_house - call.house_nanousd)),
        (6, 'revenue', NULL, 'USD', p_cost - call.cost_nanousd),
        (7, 'provider_cost', NULL, 'USD', -(p_cost - call.cost_nanousd)),
        (8, 'provider_prepaid', NULL, 'USD', p_cost - call.cost_nanousd)
    ) AS e (seq, account, wallet, currency, amount)
    WHERE e.amount <> 0
    HAVING count(*) > 0;
    IF p_cost <> call.cost_nanousd THEN
        INSERT INTO shadow_usd_ledger (id, kind, amount_nanousd, calls, memo)
        VALUES (p_tx, 'correction', p_cost - call.cost_nanousd, 1, p_memo);
    END IF;
    UPDATE calls c SET state = CASE WHEN p_cost > 0 OR p_charge > 0 THEN 'settled' ELSE c.state END,
           cost_nanousd = p_cost, provider_cost_nanousd = p_provider_cost, charge_nano = p_charge, spread_nano = p_spread,
           house_nanousd = p_house, accuracy = p_accuracy, generation_id = coalesce(c.generation_id, p_generation)
    WHERE c.id = p_call;
    IF p_cost <> call.cost_nanousd AND find_verified(ARRAY[p_call]) IS NOT NULL THEN
        INSERT INTO late_postings (settled_nanousd) VALUES (p_cost - call.cost_nanousd);
    END IF;
    IF under THEN
        PERFORM count_by_caps(
            ARRAY[p_call], ARRAY[call.user_id], ARRAY[call.wallet_id], ARRAY[call.key_id], ARRAY[0::bigint], ARRAY[0::bigint],
            ARRAY[p_charge - call.charge_nano],
            ARRAY[(p_cost - p_house) - (call.cost_nanousd - call.house_nanousd)]);
    END IF;
    IF p_charge <> call.charge_nano THEN
        PERFORM pg_notify('tuma', 'wallet:' || call.wallet_id);
    END IF;
    RETURN 'posted';
END $$;
