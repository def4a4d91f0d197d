-- Calls that people decide on: their cost could not be learned, so they are in review, and hold what was held.

-- End one, at what an operator says that it cost. 'ended', or the state in which it is: only a call in review is decided on.
-- settle_batch locks a wallet before its calls, so this does.
CREATE OR REPLACE FUNCTION end_review(
    p_batch uuid, p_call uuid, p_cost bigint, p_charge bigint, p_spread bigint, p_house bigint, p_reason text
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    call  calls%ROWTYPE;
    owner uuid;
    ended text := CASE WHEN p_cost > 0 THEN 'settled' ELSE 'void' END;
    given CONSTANT bigint[] := ARRAY[0]::bigint[];
BEGIN
    SELECT c.wallet_id INTO owner FROM calls c WHERE c.id = p_call;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no call %', p_call USING ERRCODE = 'no_data_found';
    END IF;
    PERFORM FROM wallets w WHERE w.id = owner FOR NO KEY UPDATE;
    SELECT * INTO call FROM calls c WHERE c.id = p_call FOR UPDATE;
    IF call.state <> 'review' THEN
        RETURN call.state;
    END IF;
    PERFORM settle_batch(
        p_batch, ARRAY[p_call], ARRAY[ended], ARRAY['decided'], ARRAY['estimated'], ARRAY['provider_cost'], ARRAY[NULL]::text[],
        ARRAY[p_cost], ARRAY[NULL]::bigint[], ARRAY[p_charge], ARRAY[p_spread], ARRAY[p_house],
        given, given, given, given, given, ARRAY[NULL]::integer[], ARRAY[NULL]::integer[],
        '{}'::uuid[], '{}'::numeric[], '{}'::bigint[], '{}'::bigint[]);
    PERFORM write_audit(
        'decided', 'calls', p_call::text, call.user_id, owner,
        jsonb_build_object('state', call.state, 'hold_nano', call.hold_nano),
        jsonb_build_object('state', ended, 'cost_nanousd', p_cost, 'charge_nano', p_charge, 'house_nanousd', p_house,
                           'reason', p_reason));
    RETURN 'ended';
END $$;
