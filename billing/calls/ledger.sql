-- The statements that open, extend and settle calls: each takes parallel arrays, locks wallets in id order, checks
-- everything, then writes, and may be repeated with the same input.
--
-- They are cheap for batches of a few calls, and no dearer as tables and months become many (docs/decisions/0020-batches.md):
-- * The plans of these functions are made once per connection, without looking at sizes: by their keys. A plan that was made
--   while a table was small read all of it, until somebody analyzed the table.
-- * An id tells its month: `BETWEEN low AND high` keeps the other months' partitions out.
-- * What ends is read once, where it is changed, and everything else is written from there.

-- The lowest and the highest of these ids.
CREATE OR REPLACE FUNCTION id_range(p_id uuid[], OUT low uuid, OUT high uuid) LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF cardinality(p_id) = 1 THEN
        low := p_id[1];
        high := low;
        RETURN;
    END IF;
    SELECT s.ids[1], s.ids[cardinality(s.ids)] INTO low, high FROM (SELECT ARRAY(SELECT unnest(p_id) ORDER BY 1) AS ids) s;
END $$;

-- How calls that shall be opened stand, in their order: what is decided of them (NULL: the funds decide), and what would
-- be available after them and all before them.
CREATE OR REPLACE FUNCTION judge_openings(p_id uuid[], p_wallet uuid[], p_hold bigint[], p_low uuid, p_high uuid)
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
    LEFT JOIN calls c ON c.id = a.id AND c.id = ANY (p_id) AND c.id BETWEEN p_low AND p_high
    JOIN wallets w ON w.id = a.wallet_id
$$;

-- Open calls, each with its hold. Verdicts: 'opened'; 'insufficient_funds', 'wallet_frozen' or 'cap_exceeded' (nothing was
-- written); or the state of a call that exists already, for a caller whose first commit's answer was lost.
-- A hold of zero is a call booked after the fact, at the house's cost: it needs no funds.
CREATE OR REPLACE FUNCTION open_batch(
    p_worker uuid, p_id uuid[], p_user uuid[], p_wallet uuid[], p_key uuid[], p_model text[], p_stream boolean[],
    p_price uuid[], p_fx uuid[], p_hold bigint[], p_hold_usd bigint[]
) RETURNS TABLE (call_id uuid, verdict text) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET jit = off AS $$
DECLARE
    low        uuid;
    high       uuid;
    any_capped boolean;
    refused    uuid[] := '{}';
BEGIN
    SELECT bool_or(l.capped) INTO any_capped
    FROM (SELECT w.capped FROM wallets w WHERE w.id = ANY (p_wallet) ORDER BY w.id FOR NO KEY UPDATE) l;
    SELECT r.low, r.high INTO low, high FROM id_range(p_id) r;

    IF any_capped THEN
        SELECT coalesce(admit_by_caps(
            array_agg(j.id ORDER BY j.ord), array_agg(a.user_id ORDER BY j.ord), array_agg(a.wallet_id ORDER BY j.ord),
            array_agg(a.key_id ORDER BY j.ord), array_agg(0::bigint), array_agg(0::bigint),
            array_agg(a.hold ORDER BY j.ord), array_agg(a.hold_usd ORDER BY j.ord)), '{}') INTO refused
        FROM judge_openings(p_id, p_wallet, p_hold, low, high) j
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
        JOIN judge_openings(p_id, p_wallet, p_hold, low, high) j ON j.ord = a.ord
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
CREATE OR REPLACE FUNCTION judge_extensions(p_id uuid[], p_hold bigint[], p_hold_usd bigint[], p_low uuid, p_high uuid)
RETURNS TABLE (ord bigint, id uuid, user_id uuid, wallet_id uuid, key_id uuid, state text, hold bigint, hold_usd bigint,
               more bigint, more_usd bigint, available_after bigint, capped boolean)
LANGUAGE sql STABLE AS $$
    SELECT a.ord, a.id, c.user_id, c.wallet_id, c.key_id, c.state, a.hold, a.hold_usd,
           greatest(a.hold - c.hold_nano, 0), greatest(a.hold_usd - c.hold_nanousd, 0),
           (w.posted_nano + w.overdraft_nano - w.held_nano
               - sum(greatest(a.hold - c.hold_nano, 0)) OVER (PARTITION BY c.wallet_id ORDER BY a.ord))::bigint,
           w.capped
    FROM unnest(p_id, p_hold, p_hold_usd) WITH ORDINALITY AS a (id, hold, hold_usd, ord)
    JOIN calls c ON c.id = a.id AND c.id = ANY (p_id) AND c.id BETWEEN p_low AND p_high JOIN wallets w ON w.id = c.wallet_id
$$;

-- Set the holds of open calls to larger amounts (absolute, so that a repeat changes nothing).
-- Verdicts: 'extended', 'insufficient_funds', 'cap_exceeded', or the state of a call that is no longer open.
CREATE OR REPLACE FUNCTION extend_batch(p_id uuid[], p_hold bigint[], p_hold_usd bigint[])
RETURNS TABLE (call_id uuid, verdict text) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET jit = off AS $$
DECLARE
    low        uuid;
    high       uuid;
    any_capped boolean;
    refused    uuid[] := '{}';
BEGIN
    SELECT r.low, r.high INTO low, high FROM id_range(p_id) r;
    SELECT bool_or(l.capped) INTO any_capped
    FROM (SELECT w.capped FROM wallets w
          WHERE w.id IN (SELECT c.wallet_id FROM calls c WHERE c.id = ANY (p_id) AND c.id BETWEEN low AND high)
          ORDER BY w.id FOR NO KEY UPDATE) l;

    IF any_capped THEN
        SELECT admit_by_caps(
            array_agg(j.id ORDER BY j.ord), array_agg(j.user_id ORDER BY j.ord), array_agg(j.wallet_id ORDER BY j.ord),
            array_agg(j.key_id ORDER BY j.ord), array_agg(j.hold - j.more ORDER BY j.ord),
            array_agg(j.hold_usd - j.more_usd ORDER BY j.ord), array_agg(j.more ORDER BY j.ord),
            array_agg(j.more_usd ORDER BY j.ord)) INTO refused
        FROM judge_extensions(p_id, p_hold, p_hold_usd, low, high) j
        WHERE j.capped AND j.state = 'open' AND (j.more > 0 OR j.more_usd > 0) AND (j.more = 0 OR j.available_after >= 0)
        HAVING count(*) > 0;
        refused := coalesce(refused, '{}');
    END IF;

    RETURN QUERY
    WITH ask AS (
        SELECT j.* FROM judge_extensions(p_id, p_hold, p_hold_usd, low, high) j
    ), extended AS (
        UPDATE calls c SET hold_nano = greatest(c.hold_nano, a.hold), hold_nanousd = greatest(c.hold_nanousd, a.hold_usd)
        FROM ask a WHERE c.id = a.id AND c.id = ANY (p_id) AND c.id BETWEEN low AND high
          AND a.state = 'open' AND c.state = 'open' AND (a.more = 0 OR a.available_after >= 0)
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

-- End calls, once each, whoever tries. p_state: 'settled', 'void', or 'review' (the hold stays). p_house is the part of
-- the cost that the wallet does not pay. Where p_provider_cost is less than p_cost, the rest was billed to a key of our own. p_exact names the calls that have more to tell than every call, in the three after
-- it. Returns for every id whether this attempt won, and how the call stands now. It also counts what was spent of each
-- worker's slab, keeps every window that the calls lie in, sums what was used, and lists what is late.
CREATE OR REPLACE FUNCTION settle_batch(
    p_batch uuid, p_id uuid[], p_state text[], p_outcome text[], p_accuracy text[], p_source text[], p_generation text[],
    p_cost bigint[], p_provider_cost bigint[], p_charge bigint[], p_spread bigint[], p_house bigint[],
    p_prompt bigint[], p_completion bigint[], p_cached_read bigint[], p_cached_write bigint[], p_reasoning bigint[],
    p_first_byte_ms integer[], p_duration_ms integer[],
    p_exact uuid[], p_exact_cost numeric[], p_images bigint[], p_audio bigint[]
) RETURNS TABLE (call_id uuid, won boolean, state text, charge_nano bigint, hold_nano bigint, posted_nano bigint, available_nano bigint)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
    low        uuid;
    high       uuid;
    winners    uuid[];
    late       uuid[];
    any_capped boolean;
    unbalanced uuid;
BEGIN
    PERFORM set_config('tuma.usage_kept', 'yes', true);
    SELECT r.low, r.high INTO low, high FROM id_range(p_id) r;
    SELECT bool_or(l.capped) INTO any_capped
    FROM (SELECT w.capped FROM wallets w
          WHERE w.id IN (SELECT c.wallet_id FROM calls c WHERE c.id = ANY (p_id) AND c.id BETWEEN low AND high)
          ORDER BY w.id FOR NO KEY UPDATE) l;
    IF any_capped THEN -- before anything changes, so that a window that is made now is counted as things were
        PERFORM lock_cap_windows(array_agg(c.id), array_agg(c.user_id), array_agg(c.wallet_id), array_agg(c.key_id))
        FROM calls c JOIN wallets w ON w.id = c.wallet_id
        WHERE c.id = ANY (p_id) AND c.id BETWEEN low AND high AND c.state IN ('open', 'review') AND w.capped
        HAVING count(*) > 0;
    END IF;

    WITH ends AS (
        SELECT DISTINCT ON (e.id) e.*
        FROM unnest(p_id, p_state, p_outcome, p_accuracy, p_source, p_generation, p_cost, p_provider_cost, p_charge, p_spread,
                    p_house, p_prompt, p_completion, p_cached_read, p_cached_write, p_reasoning, p_first_byte_ms, p_duration_ms)
             AS e (id, state, outcome, accuracy, source, generation, cost, provider_cost, charge, spread, house, prompt, completion,
                   cached_read, cached_write, reasoning, first_byte_ms, duration_ms)
    ), ended AS (
        -- The guard: only a live call can end, and the update decides who ended it.
        UPDATE calls c SET state = e.state, outcome = e.outcome, ended_at = now(),
               generation_id = coalesce(e.generation, c.generation_id), accuracy = e.accuracy,
               cost_nanousd = e.cost, provider_cost_nanousd = e.provider_cost, charge_nano = e.charge, spread_nano = e.spread,
               house_nanousd = e.house
        FROM ends e
        WHERE c.id = e.id AND c.id = ANY (p_id) AND c.id BETWEEN low AND high
          AND (c.state = 'open' OR (c.state = 'review' AND e.state <> 'review'))
        RETURNING c.id, c.wallet_id, c.worker_id, c.currency, c.state, c.hold_nano, e.cost, least(e.provider_cost, e.cost) AS billed,
                  e.charge, e.spread, e.house, e.source,
                  e.prompt, e.completion, e.cached_read, e.cached_write, e.reasoning, e.first_byte_ms, e.duration_ms
    ), moved AS (
        UPDATE wallets w SET held_nano = w.held_nano - m.held, posted_nano = w.posted_nano - m.charge
        FROM (SELECT n.wallet_id, sum(n.hold_nano)::bigint AS held, sum(n.charge)::bigint AS charge
              FROM ended n WHERE n.state IN ('settled', 'void') GROUP BY n.wallet_id) m
        WHERE w.id = m.wallet_id
    ), used AS (
        INSERT INTO usage (call_id, source, prompt_tokens, completion_tokens, cached_read_tokens, cached_write_tokens,
                           reasoning_tokens, first_byte_ms, duration_ms, cost_attousd, images, audio_tokens)
        SELECT n.id, n.source, n.prompt, n.completion, n.cached_read, n.cached_write, n.reasoning, n.first_byte_ms, n.duration_ms,
               x.cost, coalesce(x.images, 0), coalesce(x.audio, 0)
        FROM ended n LEFT JOIN unnest(p_exact, p_exact_cost, p_images, p_audio) AS x (id, cost, images, audio) ON x.id = n.id
        WHERE n.state = 'settled'
    ), paid AS (
        INSERT INTO journal_tx (id, kind, call_id, wallet_id)
        SELECT n.id, 'settlement', n.id, n.wallet_id FROM ended n
        WHERE n.state = 'settled' AND (n.cost > 0 OR n.charge > 0)
    ), entries AS (
        -- The wallet pays the charge; what is not markup goes through the fx position and arrives as revenue in USD;
        -- what the provider bills is taken from the prepaid account as cost.
        INSERT INTO journal_entry (tx_id, seq, account, wallet_id, currency, amount_nano)
        SELECT n.id, e.seq::smallint, e.account, e.wallet, e.currency, e.amount
        FROM ended n
        CROSS JOIN LATERAL (VALUES
            (1, 'wallet', n.wallet_id, n.currency, -n.charge),
            (2, 'fx_position', NULL, n.currency, n.charge - n.spread),
            (3, 'fx_spread', NULL, n.currency, n.spread),
            (4, 'fx_position', NULL, 'USD', -(n.cost - n.house)),
            (5, 'house_loss', NULL, 'USD', -n.house),
            (6, 'revenue', NULL, 'USD', n.cost),
            (7, 'provider_cost', NULL, 'USD', -n.cost),
            (8, 'provider_prepaid', NULL, 'USD', n.cost)
        ) AS e (seq, account, wallet, currency, amount)
        WHERE n.state = 'settled' AND e.amount <> 0
        RETURNING tx_id, currency, amount_nano
    ), consumed AS (
        INSERT INTO shadow_usd_ledger (id, kind, amount_nanousd, calls)
        SELECT p_batch, 'settlement', sum(n.billed)::bigint, count(*)::integer FROM ended n WHERE n.state = 'settled'
        HAVING count(*) > 0
        UNION ALL
        SELECT n.id, 'own_key', n.cost - n.billed, 1 FROM ended n WHERE n.state = 'settled' AND n.cost > n.billed
    ), spent AS (
        INSERT INTO quota_slabs (worker_id, spent_nanousd)
        SELECT n.worker_id, sum(n.billed)::bigint FROM ended n WHERE n.state = 'settled' AND n.cost > 0 GROUP BY n.worker_id
        ON CONFLICT (worker_id) DO UPDATE SET spent_nanousd = quota_slabs.spent_nanousd + excluded.spent_nanousd
    )
    SELECT coalesce((SELECT array_agg(n.id) FROM ended n), '{}'),
           (SELECT t.tx_id FROM entries t GROUP BY t.tx_id, t.currency HAVING sum(t.amount_nano) <> 0 LIMIT 1)
    INTO winners, unbalanced;
    IF unbalanced IS NOT NULL THEN
        RAISE EXCEPTION 'transaction % does not balance', unbalanced USING ERRCODE = 'integrity_constraint_violation';
    END IF;

    IF cardinality(winners) > 0 THEN
        IF any_capped THEN
            PERFORM count_by_caps(
                array_agg(c.id), array_agg(c.user_id), array_agg(c.wallet_id), array_agg(c.key_id), array_agg(-c.hold_nano),
                array_agg(-c.hold_nanousd), array_agg(c.charge_nano), array_agg(c.cost_nanousd - c.house_nanousd))
            FROM calls c JOIN wallets w ON w.id = c.wallet_id
            WHERE c.id = ANY (winners) AND c.id BETWEEN low AND high AND c.state IN ('settled', 'void') AND w.capped
            HAVING count(*) > 0;
        END IF;
        PERFORM add_usage(winners, 1);
        IF low < uuid_floor(now() - interval '1 hour') THEN -- else find_verified would find nothing, as it says
            late := find_verified(winners);
            IF late IS NOT NULL THEN
                INSERT INTO late_postings (tx_id) SELECT t.id FROM journal_tx t WHERE t.id = ANY (late);
                INSERT INTO late_postings (settled_nanousd) SELECT c.cost_nanousd FROM calls c
                WHERE c.id = ANY (late) AND c.state = 'settled' AND c.cost_nanousd > 0;
            END IF;
        END IF;
    END IF;

    RETURN QUERY
    SELECT c.id, c.id = ANY (winners), c.state, coalesce(c.charge_nano, 0), c.hold_nano, w.posted_nano,
           w.posted_nano + w.overdraft_nano - w.held_nano
    FROM calls c JOIN wallets w ON w.id = c.wallet_id WHERE c.id = ANY (p_id) AND c.id BETWEEN low AND high;
END $$;

-- The ids of answers; rows that somebody else has locked are left out. Returns those calls that are noted now.
CREATE OR REPLACE FUNCTION note_generations(p_id uuid[], p_generation text[]) RETURNS SETOF uuid LANGUAGE plpgsql AS $$
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

-- Everything that Redis admits a user's calls by, as fields of their mirror, from one snapshot: see `billing/holds/admission.py`.
CREATE OR REPLACE FUNCTION read_mirror(p_user uuid, p_moment timestamptz) RETURNS TABLE (field text, value text) LANGUAGE sql STABLE AS $$
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
