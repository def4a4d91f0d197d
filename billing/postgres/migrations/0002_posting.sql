-- The one posting function and the three that move calls: open_batch, extend_batch, settle_batch. Each takes parallel
-- arrays, locks wallets in id order, checks everything, then writes; each may be repeated with the same input.

CREATE FUNCTION post_entries(
    p_tx uuid[], p_seq smallint[], p_account text[], p_wallet uuid[], p_currency text[], p_amount bigint[]
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    broken record;
BEGIN
    SELECT e.tx, e.currency, sum(e.amount) AS total INTO broken
    FROM unnest(p_tx, p_currency, p_amount) AS e (tx, currency, amount)
    GROUP BY e.tx, e.currency HAVING sum(e.amount) <> 0 LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'transaction % does not balance: % % nano', broken.tx, broken.total, broken.currency
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;

    INSERT INTO journal_entry (tx_id, seq, account, wallet_id, currency, amount_nano)
    SELECT * FROM unnest(p_tx, p_seq, p_account, p_wallet, p_currency, p_amount);

    UPDATE wallets w SET posted_nano = w.posted_nano + moved.amount
    FROM (SELECT e.wallet, sum(e.amount)::bigint AS amount
          FROM unnest(p_wallet, p_amount) AS e (wallet, amount) WHERE e.wallet IS NOT NULL GROUP BY e.wallet) moved
    WHERE w.id = moved.wallet;
END $$;

-- Open calls, each with its hold. Verdicts: 'opened'; 'insufficient_funds' or 'wallet_frozen' (nothing was written);
-- or the state of a call that exists already, for a caller whose first commit's answer was lost.
-- A hold of zero is a call booked after the fact, at the house's cost: it needs no funds.
CREATE FUNCTION open_batch(
    p_worker uuid, p_id uuid[], p_user uuid[], p_wallet uuid[], p_key uuid[], p_model text[], p_stream boolean[],
    p_price uuid[], p_fx uuid[], p_hold bigint[], p_hold_usd bigint[]
) RETURNS TABLE (call_id uuid, verdict text) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM wallets w WHERE w.id = ANY (p_wallet) ORDER BY w.id FOR NO KEY UPDATE;

    RETURN QUERY
    WITH ask AS (
        SELECT a.*, c.state AS known
        FROM unnest(p_id, p_user, p_wallet, p_key, p_model, p_stream, p_price, p_fx, p_hold, p_hold_usd)
             WITH ORDINALITY AS a (id, user_id, wallet_id, key_id, model, stream, price_id, fx_id, hold, hold_usd, ord)
        LEFT JOIN calls c ON c.id = a.id
    ), judged AS (
        SELECT a.*, w.currency,
               w.posted_nano + w.overdraft_nano - w.held_nano
                   - sum(CASE WHEN a.known IS NULL THEN a.hold ELSE 0 END)
                         OVER (PARTITION BY a.wallet_id ORDER BY a.ord) AS available_after,
               CASE WHEN a.known IS NOT NULL THEN CASE a.known WHEN 'open' THEN 'opened' ELSE a.known END
                    WHEN a.hold = 0 THEN 'house'
                    WHEN w.status <> 'active' THEN 'wallet_frozen' END AS decided
        FROM ask a JOIN wallets w ON w.id = a.wallet_id
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

-- Set the holds of open calls to larger amounts (absolute, so that a repeat changes nothing).
-- Verdicts: 'extended', 'insufficient_funds', or the state of a call that is no longer open.
CREATE FUNCTION extend_batch(p_id uuid[], p_hold bigint[], p_hold_usd bigint[])
RETURNS TABLE (call_id uuid, verdict text) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM wallets w
    WHERE w.id IN (SELECT c.wallet_id FROM calls c WHERE c.id = ANY (p_id)) ORDER BY w.id FOR NO KEY UPDATE;

    RETURN QUERY
    WITH ask AS (
        SELECT a.id, a.hold, a.hold_usd, c.wallet_id, c.state, greatest(a.hold - c.hold_nano, 0) AS more,
               w.posted_nano + w.overdraft_nano - w.held_nano
                   - sum(greatest(a.hold - c.hold_nano, 0)) OVER (PARTITION BY c.wallet_id ORDER BY a.ord) AS available_after
        FROM unnest(p_id, p_hold, p_hold_usd) WITH ORDINALITY AS a (id, hold, hold_usd, ord)
        JOIN calls c ON c.id = a.id JOIN wallets w ON w.id = c.wallet_id
    ), extended AS (
        UPDATE calls c SET hold_nano = greatest(c.hold_nano, a.hold), hold_nanousd = greatest(c.hold_nanousd, a.hold_usd)
        FROM ask a WHERE c.id = a.id AND a.state = 'open' AND c.state = 'open' AND (a.more = 0 OR a.available_after >= 0)
        RETURNING c.id, a.wallet_id, a.more
    ), held AS (
        UPDATE wallets w SET held_nano = w.held_nano + s.amount
        FROM (SELECT x.wallet_id, sum(x.more)::bigint AS amount FROM extended x GROUP BY x.wallet_id) s
        WHERE w.id = s.wallet_id AND s.amount > 0
    )
    SELECT a.id, CASE WHEN x.id IS NOT NULL THEN 'extended' WHEN a.state <> 'open' THEN a.state ELSE 'insufficient_funds' END
    FROM ask a LEFT JOIN extended x ON x.id = a.id;
END $$;

-- End calls, once each, whoever tries. p_state: 'settled', 'void', or 'review' (the hold stays). p_house is the part of
-- the cost that the wallet does not pay. Returns for every id whether this attempt won, and how the call stands now.
CREATE FUNCTION settle_batch(
    p_batch uuid, p_id uuid[], p_state text[], p_outcome text[], p_accuracy text[], p_source text[], p_generation text[],
    p_cost bigint[], p_provider_cost bigint[], p_charge bigint[], p_spread bigint[], p_house bigint[],
    p_prompt bigint[], p_completion bigint[], p_cached_read bigint[], p_cached_write bigint[], p_reasoning bigint[],
    p_first_byte_ms integer[], p_duration_ms integer[]
) RETURNS TABLE (call_id uuid, won boolean, state text, charge_nano bigint, hold_nano bigint, posted_nano bigint, available_nano bigint)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    winners uuid[];
BEGIN
    PERFORM 1 FROM wallets w
    WHERE w.id IN (SELECT c.wallet_id FROM calls c WHERE c.id = ANY (p_id)) ORDER BY w.id FOR NO KEY UPDATE;

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
    END IF;

    RETURN QUERY
    SELECT c.id, c.id = ANY (winners), c.state, coalesce(c.charge_nano, 0), c.hold_nano, w.posted_nano,
           w.posted_nano + w.overdraft_nano - w.held_nano
    FROM calls c JOIN wallets w ON w.id = c.wallet_id WHERE c.id = ANY (p_id);
END $$;

-- Put money into a wallet from an operator's hand. Idempotent by key: a repeat with the same input returns the first
-- transaction; with another input it is refused.
CREATE FUNCTION grant_credit(p_tx uuid, p_wallet uuid, p_amount bigint, p_memo text, p_key text, p_hash bytea)
RETURNS TABLE (tx_id uuid, posted_nano bigint) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    coin  text;
    first record;
BEGIN
    IF p_amount <= 0 THEN
        RAISE EXCEPTION 'a credit must be positive' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    SELECT w.currency INTO coin FROM wallets w WHERE w.id = p_wallet FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no wallet %', p_wallet USING ERRCODE = 'no_data_found';
    END IF;
    INSERT INTO posting_keys (key, input_hash, tx_id) VALUES (p_key, p_hash, p_tx) ON CONFLICT (key) DO NOTHING;
    SELECT k.tx_id, k.input_hash INTO first FROM posting_keys k WHERE k.key = p_key;
    IF first.input_hash <> p_hash THEN
        RAISE EXCEPTION 'idempotency key % was used with another input', p_key USING ERRCODE = 'unique_violation';
    END IF;
    IF first.tx_id = p_tx THEN
        INSERT INTO journal_tx (id, kind, wallet_id, memo) VALUES (p_tx, 'grant', p_wallet, p_memo);
        PERFORM post_entries(ARRAY[p_tx, p_tx], ARRAY[1, 2]::smallint[], ARRAY['wallet', 'grant'],
                             ARRAY[p_wallet, NULL], ARRAY[coin, coin], ARRAY[p_amount, -p_amount]);
        PERFORM pg_notify('tuma', 'wallet:' || p_wallet);
    END IF;
    RETURN QUERY SELECT first.tx_id, w.posted_nano FROM wallets w WHERE w.id = p_wallet;
END $$;

-- Caches of the running workers follow what an operator changes.
CREATE FUNCTION notify_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('tuma', TG_ARGV[0] || ':' || CASE WHEN TG_ARGV[0] IN ('key', 'wallet') THEN NEW.id::text ELSE '' END);
    RETURN NULL;
END $$;
CREATE TRIGGER api_keys_changed AFTER UPDATE ON api_keys FOR EACH ROW EXECUTE FUNCTION notify_change('key');
CREATE TRIGGER wallets_changed AFTER UPDATE OF status, overdraft_nano ON wallets
    FOR EACH ROW EXECUTE FUNCTION notify_change('wallet');
CREATE TRIGGER model_prices_changed AFTER INSERT OR UPDATE ON model_prices
    FOR EACH ROW EXECUTE FUNCTION notify_change('prices');
CREATE TRIGGER fx_quotes_changed AFTER INSERT OR UPDATE ON fx_quotes FOR EACH ROW EXECUTE FUNCTION notify_change('fx');
