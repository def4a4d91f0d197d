-- Wishes to pay, from the first to the end that is known of them.

-- Note a person's wish to pay into their wallet. With an idempotency key, a repeat returns the first intent; with another
-- input it is refused (unique_violation). p_live_max: how many of a wallet's intents may wait for money at once
-- (program_limit_exceeded); p_saves: the payer lets us keep what they pay with.
CREATE OR REPLACE FUNCTION own_create_intent(
    p_id uuid, p_wallet uuid, p_provider text, p_currency text, p_amount bigint, p_key text, p_expires interval, p_poll interval,
    p_saves boolean, p_live_max integer
) RETURNS payment_intents LANGUAGE plpgsql AS $$
DECLARE
    purse wallets;
    made  payment_intents;
BEGIN
    SELECT * INTO purse FROM wallets w WHERE w.id = p_wallet AND w.user_id = require_person() FOR NO KEY UPDATE; -- counted one by one
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no wallet %', p_wallet USING ERRCODE = 'no_data_found';
    END IF;
    IF purse.currency <> p_currency THEN
        RAISE EXCEPTION 'this wallet is in %', purse.currency USING ERRCODE = 'invalid_parameter_value';
    END IF;
    SELECT * INTO made FROM payment_intents i WHERE i.wallet_id = p_wallet AND i.idempotency_key = p_key;
    IF FOUND THEN
        IF (made.provider, made.currency, made.amount_nano) <> (p_provider, p_currency, p_amount) THEN
            RAISE EXCEPTION 'idempotency key % was used with another input', p_key USING ERRCODE = 'unique_violation';
        END IF;
        RETURN made;
    END IF;
    IF (SELECT count(*) FROM payment_intents i
        WHERE i.wallet_id = p_wallet AND i.kind = 'topup' AND i.state IN ('creating', 'pending')) >= p_live_max THEN
        RAISE EXCEPTION '% top-ups wait to be paid already', p_live_max USING ERRCODE = 'program_limit_exceeded';
    END IF;
    INSERT INTO payment_intents (id, wallet_id, user_id, kind, provider, currency, amount_nano, idempotency_key, expires_at, poll_at,
                                 method_due)
    VALUES (p_id, purse.id, purse.user_id, 'topup', p_provider, p_currency, p_amount, p_key, now() + p_expires, now() + p_poll, p_saves)
    RETURNING * INTO made;
    RETURN made;
END $$;

-- The provider has a page for it, or refused one. False: it is past that already.
CREATE OR REPLACE FUNCTION note_page(p_id uuid, p_provider_id text, p_url text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE payment_intents SET state = 'pending', provider_id = p_provider_id, url = p_url
    WHERE id = p_id AND state IN ('creating', 'pending');
    RETURN FOUND;
END $$;

-- A page whose making nobody heard of is asked for again, under another reference. Returns the number of the attempt.
CREATE OR REPLACE FUNCTION try_page_again(p_id uuid, p_attempt integer) RETURNS integer LANGUAGE plpgsql AS $$
BEGIN
    UPDATE payment_intents SET attempt = attempt + 1 WHERE id = p_id AND state = 'creating' AND attempt = p_attempt;
    RETURN (SELECT i.attempt FROM payment_intents i WHERE i.id = p_id);
END $$;

-- It failed or expired, as far as is known now. Money that was paid is not forgotten by it. The end of one that was to happen
-- by itself is told; the third in a row is the last. A paid one counts anew (forgive_failures).
CREATE OR REPLACE FUNCTION end_intent(p_id uuid, p_state text, p_note text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    ended payment_intents;
    auto  auto_topups;
    told  bigint;
BEGIN
    UPDATE payment_intents i SET state = p_state, note = p_note, ended_at = now()
    WHERE i.id = p_id AND p_state IN ('failed', 'expired') AND i.state IN ('creating', 'pending') RETURNING * INTO ended;
    IF NOT FOUND THEN
        UPDATE payment_intents SET state = p_state, note = p_note, ended_at = now()
        WHERE id = p_id AND p_state = 'expired' AND state = 'failed';
        RETURN FOUND;
    END IF;
    IF ended.kind = 'auto' THEN
        UPDATE auto_topups a SET failures = a.failures + 1, enabled = a.enabled AND a.failures < 2,
               note = CASE WHEN a.enabled AND a.failures >= 2 THEN 'switched off: three in a row did not succeed; the last: ' || p_note
                           ELSE p_note END
        WHERE a.wallet_id = ended.wallet_id RETURNING * INTO auto;
        INSERT INTO events (user_id, wallet_id, kind, body)
        VALUES (ended.user_id, ended.wallet_id, 'auto_topup.failed',
                jsonb_build_object('topup_id', ended.id, 'amount', major_text(ended.amount_nano), 'currency', ended.currency,
                                   'note', p_note, 'enabled', coalesce(auto.enabled, false)))
        RETURNING id INTO told;
        PERFORM pg_notify('tuma', 'event:' || ended.user_id || ':' || told);
    END IF;
    RETURN true;
END $$;

-- Intents whose payment nobody has told of, each to one process: who takes one has it for `p_lease`. The pauses between two
-- questions double, from `p_pause` to an hour; `p_late` after it expired it is asked about no more.
CREATE OR REPLACE FUNCTION take_intents(p_limit integer, p_lease interval, p_pause interval, p_late interval)
RETURNS SETOF payment_intents LANGUAGE sql AS $$
    UPDATE payment_intents i SET polls = i.polls + 1,
           poll_at = CASE WHEN (i.state IN ('paid', 'review') AND NOT i.method_due) OR now() > i.expires_at + p_late THEN NULL
                          ELSE now() + greatest(p_lease, least(p_pause * power(2, least(i.polls, 20)), interval '1 hour')) END
    FROM (SELECT d.id FROM payment_intents d WHERE d.poll_at <= now() ORDER BY d.poll_at LIMIT p_limit
          FOR UPDATE SKIP LOCKED) due
    WHERE i.id = due.id RETURNING i.*
$$;

CREATE OR REPLACE FUNCTION find_intent(p_id uuid) RETURNS SETOF payment_intents LANGUAGE sql STABLE AS $$
    SELECT i.* FROM payment_intents i WHERE i.id = p_id
$$;
