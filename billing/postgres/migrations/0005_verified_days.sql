-- Days whose books were proved once and need not be read again. A call's id and its settlement's tell when the call
-- arrived, so that a day is a range of ids. The journal is append-only; what is posted into a proved day all the same (a
-- call that took very long, a correction of its cost) is listed here, and counted beside it.

CREATE TABLE verified_days (
    day             date PRIMARY KEY,
    end_id          uuid NOT NULL UNIQUE, -- every id below it, from the previous day's on, is in this row
    calls           bigint NOT NULL,
    entries         bigint NOT NULL,
    settled_nanousd bigint NOT NULL, -- Σ cost of its settled calls, and of losses without a call
    cost_nanousd    bigint NOT NULL, -- Σ provider cost of its entries
    verified_at     timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE verified_wallets (
    wallet_id   uuid PRIMARY KEY,
    amount_nano bigint NOT NULL -- Σ entries of the wallet in all verified days
);
CREATE TABLE late_postings (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tx_id           uuid,                      -- a transaction posted into a verified day
    settled_nanousd bigint NOT NULL DEFAULT 0, -- by how much the settled cost of a verified day's calls changed
    created_at      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX journal_entry_psp ON journal_entry (currency) WHERE account = 'psp_clearing'; -- I5, over all days

-- Return those ids that lie in verified days, NULL if none does. A day is verified an hour and more after its end, under
-- the lock that is shared here: who posts into an older day either comes before its proof or sees it.
CREATE FUNCTION find_verified(p_ids uuid[]) RETURNS uuid[] LANGUAGE plpgsql AS $$
DECLARE
    lowest uuid;
    cut    uuid;
BEGIN
    SELECT i.id INTO lowest FROM unnest(p_ids) AS i (id) ORDER BY i.id LIMIT 1;
    IF lowest >= uuid_floor(now() - interval '1 hour') THEN
        RETURN NULL;
    END IF;
    PERFORM pg_advisory_xact_lock_shared(1684109683); -- "days"
    SELECT d.end_id INTO cut FROM verified_days d ORDER BY d.day DESC LIMIT 1;
    IF cut IS NULL OR lowest >= cut THEN
        RETURN NULL;
    END IF;
    RETURN ARRAY(SELECT DISTINCT i.id FROM unnest(p_ids) AS i (id) WHERE i.id < cut);
END $$;

-- As in 0002, and what is posted late is listed.
CREATE OR REPLACE FUNCTION post_entries(
    p_tx uuid[], p_seq smallint[], p_account text[], p_wallet uuid[], p_currency text[], p_amount bigint[]
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    broken record;
    late   uuid[];
BEGIN
    SELECT e.tx, e.currency, sum(e.amount) AS total INTO broken
    FROM unnest(p_tx, p_currency, p_amount) AS e (tx, currency, amount)
    GROUP BY e.tx, e.currency HAVING sum(e.amount) <> 0 LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'transaction % does not balance: % % nano', broken.tx, broken.total, broken.currency
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;

    late := find_verified(p_tx);
    IF late IS NOT NULL THEN
        INSERT INTO late_postings (tx_id) SELECT DISTINCT l.id FROM unnest(late) AS l (id);
    END IF;
    INSERT INTO journal_entry (tx_id, seq, account, wallet_id, currency, amount_nano)
    SELECT * FROM unnest(p_tx, p_seq, p_account, p_wallet, p_currency, p_amount);

    UPDATE wallets w SET posted_nano = w.posted_nano + moved.amount
    FROM (SELECT e.wallet, sum(e.amount)::bigint AS amount
          FROM unnest(p_wallet, p_amount) AS e (wallet, amount) WHERE e.wallet IS NOT NULL GROUP BY e.wallet) moved
    WHERE w.id = moved.wallet;
END $$;

-- As in 0002; also counts what was spent of each worker's slab, and lists what is late.
CREATE OR REPLACE FUNCTION settle_batch(
    p_batch uuid, p_id uuid[], p_state text[], p_outcome text[], p_accuracy text[], p_source text[], p_generation text[],
    p_cost bigint[], p_provider_cost bigint[], p_charge bigint[], p_spread bigint[], p_house bigint[],
    p_prompt bigint[], p_completion bigint[], p_cached_read bigint[], p_cached_write bigint[], p_reasoning bigint[],
    p_first_byte_ms integer[], p_duration_ms integer[]
) RETURNS TABLE (call_id uuid, won boolean, state text, charge_nano bigint, hold_nano bigint, posted_nano bigint, available_nano bigint)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    winners uuid[];
    late    uuid[];
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

-- As in 0003, and what it changes of a verified day is listed.
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
BEGIN
    SELECT c.wallet_id INTO owner FROM calls c WHERE c.id = p_call;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no call %', p_call USING ERRCODE = 'no_data_found';
    END IF;
    PERFORM 1 FROM wallets w WHERE w.id = owner FOR NO KEY UPDATE; -- the wallet first, as every posting does
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
    IF p_charge <> call.charge_nano THEN
        PERFORM pg_notify('tuma', 'wallet:' || call.wallet_id);
    END IF;
    RETURN 'posted';
END $$;
