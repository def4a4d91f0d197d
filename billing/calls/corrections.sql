-- Later postings that repair an ended call: corrections towards the provider's figure, and refunds.

-- Bring an ended call to new figures by posting the difference: what was posted stays, and the call's row shows how it
-- stands now. The caller says from which figures it computed them: if the call has moved on since, nothing is posted and
-- 'stale' is returned. Idempotent by key, as grant_credit. What it changes of a verified day is listed.
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
    billed bigint; -- more than before, to our account: what is beyond it went to a key of our own
BEGIN
    PERFORM set_config('tuma.usage_kept', 'yes', true);
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
    billed := least(p_provider_cost, p_cost) - least(call.provider_cost_nanousd, call.cost_nanousd);
    INSERT INTO shadow_usd_ledger (id, kind, amount_nanousd, calls, memo)
    SELECT r.id, r.kind, r.amount, 1, p_memo
    FROM (VALUES
        (p_tx, 'correction', billed),
        (gen_random_uuid(), 'own_key', p_cost - call.cost_nanousd - billed)
    ) AS r (id, kind, amount)
    WHERE r.amount <> 0;
    PERFORM add_usage(ARRAY[p_call], -1);
    UPDATE calls c SET state = CASE WHEN p_cost > 0 OR p_charge > 0 THEN 'settled' ELSE c.state END,
           cost_nanousd = p_cost, provider_cost_nanousd = p_provider_cost, charge_nano = p_charge, spread_nano = p_spread,
           house_nanousd = p_house, accuracy = p_accuracy, generation_id = coalesce(c.generation_id, p_generation)
    WHERE c.id = p_call;
    PERFORM add_usage(ARRAY[p_call], 1);
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
