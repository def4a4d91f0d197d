-- Wallets that top themselves up: below a threshold, from a means of payment that its owner let us keep, at most once in a while.

-- method_id: which means of payment an intent of kind 'auto' charges; the customer is its provider_id. method_due: the payer
-- let us keep what they pay with, and it is still to be noted.
ALTER TABLE payment_intents ADD COLUMN method_id text, ADD COLUMN method_due boolean NOT NULL DEFAULT false;
CREATE INDEX payment_intents_live ON payment_intents (wallet_id) WHERE state IN ('creating', 'pending');
SELECT audit_table('payment_intents', '{id}', '{poll_at,polls,method_due}');

CREATE TABLE payment_methods (
    wallet_id   uuid PRIMARY KEY REFERENCES wallets,
    provider    text NOT NULL CHECK (provider IN ('stripe')),
    customer_id text NOT NULL,
    method_id   text NOT NULL,
    label       text NOT NULL, -- for people: "visa …4242"
    created_at  timestamptz NOT NULL DEFAULT now()
);

-- failures: in a row; the third switches it off. note: why it is off, where its owner did not say so.
CREATE TABLE auto_topups (
    wallet_id      uuid PRIMARY KEY REFERENCES wallets,
    enabled        boolean NOT NULL,
    threshold_nano bigint CHECK (threshold_nano >= 0),
    amount_nano    bigint CHECK (amount_nano > 0),
    pause          interval NOT NULL, -- from one to the next, at least
    failures       integer NOT NULL DEFAULT 0,
    note           text NOT NULL DEFAULT '',
    last_at        timestamptz,
    last_intent_id uuid REFERENCES payment_intents,
    CHECK (NOT enabled OR (threshold_nano IS NOT NULL AND amount_nano IS NOT NULL))
);
SELECT audit_table('payment_methods', '{wallet_id}'),
       audit_table('auto_topups', '{wallet_id}');

-- As in 0012, with p_live_max: how many of a wallet's intents may wait for money at once (program_limit_exceeded);
-- p_saves: the payer lets us keep what they pay with.
DROP FUNCTION own_create_intent(uuid, uuid, text, text, bigint, text, interval, interval);
CREATE FUNCTION own_create_intent(
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

-- An intent that was paid is looked at once more for the means of payment, until that is noted.
CREATE FUNCTION look_for_method() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.poll_at := now();
    NEW.polls := 0;
    RETURN NEW;
END $$;
CREATE TRIGGER payment_intents_method BEFORE UPDATE OF state ON payment_intents FOR EACH ROW
    WHEN (NEW.state = 'paid' AND OLD.state <> 'paid' AND NEW.method_due) EXECUTE FUNCTION look_for_method();

CREATE OR REPLACE FUNCTION take_intents(p_limit integer, p_lease interval, p_pause interval, p_late interval)
RETURNS SETOF payment_intents LANGUAGE sql AS $$
    UPDATE payment_intents i SET polls = i.polls + 1,
           poll_at = CASE WHEN (i.state IN ('paid', 'review') AND NOT i.method_due) OR now() > i.expires_at + p_late THEN NULL
                          ELSE now() + greatest(p_lease, least(p_pause * power(2, least(i.polls, 20)), interval '1 hour')) END
    FROM (SELECT d.id FROM payment_intents d WHERE d.poll_at <= now() ORDER BY d.poll_at LIMIT p_limit
          FOR UPDATE SKIP LOCKED) due
    WHERE i.id = due.id RETURNING i.*
$$;

-- Note with what an intent was paid, once; without one, that nothing was kept. False: it is noted already, or not paid.
CREATE FUNCTION note_method(p_intent uuid, p_customer text, p_method text, p_label text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    paid payment_intents;
BEGIN
    UPDATE payment_intents i SET method_due = false, poll_at = NULL
    WHERE i.id = p_intent AND i.method_due AND i.state = 'paid' RETURNING * INTO paid;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF p_method IS NOT NULL THEN
        INSERT INTO payment_methods (wallet_id, provider, customer_id, method_id, label)
        VALUES (paid.wallet_id, paid.provider, p_customer, p_method, p_label)
        ON CONFLICT (wallet_id) DO UPDATE SET provider = excluded.provider, customer_id = excluded.customer_id,
            method_id = excluded.method_id, label = excluded.label, created_at = now();
    END IF;
    RETURN true;
END $$;

-- Let go of what was begun and not asked of the provider yet, as far as is known; money that comes all the same is credited.
CREATE FUNCTION drop_auto_intents(p_wallet uuid) RETURNS void LANGUAGE sql AS $$
    UPDATE payment_intents SET state = 'failed', note = 'it was switched off', ended_at = now()
    WHERE wallet_id = p_wallet AND kind = 'auto' AND state = 'creating'
$$;

-- Set when and how a person's wallet tops itself up. Refused where nothing is kept to pay with (invalid_parameter_value).
CREATE FUNCTION own_set_auto_topup(p_wallet uuid, p_enabled boolean, p_threshold bigint, p_amount bigint, p_pause interval)
RETURNS auto_topups LANGUAGE plpgsql AS $$
DECLARE
    made auto_topups;
BEGIN
    PERFORM 1 FROM wallets w WHERE w.id = p_wallet AND w.user_id = require_person() FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no wallet %', p_wallet USING ERRCODE = 'no_data_found';
    END IF;
    IF p_enabled AND NOT EXISTS (SELECT FROM payment_methods m WHERE m.wallet_id = p_wallet) THEN
        RAISE EXCEPTION 'no means of payment is kept' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF NOT p_enabled THEN
        PERFORM drop_auto_intents(p_wallet); -- intents are locked before the settings, as where one ends
    END IF;
    INSERT INTO auto_topups AS a (wallet_id, enabled, threshold_nano, amount_nano, pause)
    VALUES (p_wallet, p_enabled, p_threshold, p_amount, p_pause)
    ON CONFLICT (wallet_id) DO UPDATE SET enabled = excluded.enabled, threshold_nano = excluded.threshold_nano,
        amount_nano = excluded.amount_nano, pause = excluded.pause, failures = 0, note = ''
    RETURNING * INTO made;
    RETURN made;
END $$;

-- Forget what a person's wallet pays with: nothing is charged any more.
CREATE FUNCTION own_forget_method(p_wallet uuid) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM wallets w WHERE w.id = p_wallet AND w.user_id = require_person() FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no wallet %', p_wallet USING ERRCODE = 'no_data_found';
    END IF;
    UPDATE payment_intents SET method_due = false WHERE wallet_id = p_wallet AND method_due;
    PERFORM drop_auto_intents(p_wallet);
    UPDATE auto_topups SET enabled = false, note = 'the means of payment was removed' WHERE wallet_id = p_wallet AND enabled;
    DELETE FROM payment_methods WHERE wallet_id = p_wallet;
    RETURN FOUND;
END $$;

-- Whether it is time: enabled, below the threshold, long enough after the last, and the wallet may spend at all.
CREATE FUNCTION is_topup_due(p_auto auto_topups, p_wallet wallets) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT p_auto.enabled AND p_wallet.status = 'active' AND p_wallet.posted_nano < p_auto.threshold_nano
       AND (p_auto.last_at IS NULL OR p_auto.last_at + p_auto.pause <= now())
$$;
CREATE FUNCTION find_auto_topups(p_limit integer) RETURNS SETOF uuid LANGUAGE sql STABLE AS $$
    SELECT a.wallet_id FROM auto_topups a JOIN wallets w ON w.id = a.wallet_id JOIN users u ON u.id = w.user_id
    WHERE a.enabled AND u.status = 'active' AND is_topup_due(a, w) ORDER BY a.last_at NULLS FIRST LIMIT p_limit
$$;
-- Begin one: the intent that charges what is kept now. No row: it is not time any more, or one is under way.
CREATE FUNCTION begin_auto_topup(p_id uuid, p_wallet uuid, p_expires interval) RETURNS SETOF payment_intents LANGUAGE plpgsql AS $$
DECLARE
    purse wallets;
    auto  auto_topups;
    kept  payment_methods;
BEGIN
    SELECT * INTO purse FROM wallets w WHERE w.id = p_wallet FOR NO KEY UPDATE;
    SELECT * INTO auto FROM auto_topups a WHERE a.wallet_id = p_wallet FOR UPDATE;
    SELECT * INTO kept FROM payment_methods m WHERE m.wallet_id = p_wallet;
    IF auto.wallet_id IS NULL OR kept.wallet_id IS NULL OR NOT is_topup_due(auto, purse) OR EXISTS (
        SELECT FROM payment_intents i WHERE i.wallet_id = p_wallet AND i.kind = 'auto' AND i.state IN ('creating', 'pending')
    ) THEN
        RETURN;
    END IF;
    INSERT INTO payment_intents (id, wallet_id, user_id, kind, provider, currency, amount_nano, provider_id, method_id, expires_at, poll_at)
    VALUES (p_id, p_wallet, purse.user_id, 'auto', kept.provider, purse.currency, auto.amount_nano, kept.customer_id, kept.method_id,
            now() + p_expires, now());
    UPDATE auto_topups SET last_at = now(), last_intent_id = p_id WHERE wallet_id = p_wallet;
    RETURN QUERY SELECT i.* FROM payment_intents i WHERE i.id = p_id;
END $$;

-- As in 0012. The end of one that was to happen by itself is told; the third in a row is the last. A paid one counts anew.
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
CREATE FUNCTION forgive_failures() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE auto_topups SET failures = 0, note = '' WHERE wallet_id = NEW.wallet_id AND failures > 0 AND enabled;
    RETURN NULL;
END $$;
CREATE TRIGGER payment_intents_auto_paid AFTER UPDATE OF state ON payment_intents FOR EACH ROW
    WHEN (NEW.state = 'paid' AND OLD.state <> 'paid' AND NEW.kind = 'auto') EXECUTE FUNCTION forgive_failures();
