-- Wallets that top themselves up: below a threshold, from a means of payment that its owner let us keep, at most once in
-- a while.

-- An intent that was paid is looked at once more for the means of payment, until that is noted.
CREATE OR REPLACE FUNCTION look_for_method() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.poll_at := now();
    NEW.polls := 0;
    RETURN NEW;
END $$;

-- Note with what an intent was paid, once; without one, that nothing was kept. False: it is noted already, or not paid.
CREATE OR REPLACE FUNCTION note_method(p_intent uuid, p_customer text, p_method text, p_label text) RETURNS boolean LANGUAGE plpgsql AS $$
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
CREATE OR REPLACE FUNCTION drop_auto_intents(p_wallet uuid) RETURNS void LANGUAGE sql AS $$
    UPDATE payment_intents SET state = 'failed', note = 'it was switched off', ended_at = now()
    WHERE wallet_id = p_wallet AND kind = 'auto' AND state = 'creating'
$$;

-- Set when and how a person's wallet tops itself up. Refused where nothing is kept to pay with (invalid_parameter_value).
CREATE OR REPLACE FUNCTION own_set_auto_topup(p_wallet uuid, p_enabled boolean, p_threshold bigint, p_amount bigint, p_pause interval)
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
CREATE OR REPLACE FUNCTION own_forget_method(p_wallet uuid) RETURNS boolean LANGUAGE plpgsql AS $$
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
CREATE OR REPLACE FUNCTION is_topup_due(p_auto auto_topups, p_wallet wallets) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT p_auto.enabled AND p_wallet.status = 'active' AND p_wallet.posted_nano < p_auto.threshold_nano
       AND (p_auto.last_at IS NULL OR p_auto.last_at + p_auto.pause <= now())
$$;

CREATE OR REPLACE FUNCTION find_auto_topups(p_limit integer) RETURNS SETOF uuid LANGUAGE sql STABLE AS $$
    SELECT a.wallet_id FROM auto_topups a JOIN wallets w ON w.id = a.wallet_id JOIN users u ON u.id = w.user_id
    WHERE a.enabled AND u.status = 'active' AND is_topup_due(a, w) ORDER BY a.last_at NULLS FIRST LIMIT p_limit
$$;

-- Begin one: the intent that charges what is kept now. No row: it is not time any more, or one is under way.
CREATE OR REPLACE FUNCTION begin_auto_topup(p_id uuid, p_wallet uuid, p_expires interval) RETURNS SETOF payment_intents LANGUAGE plpgsql AS $$
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

-- A top-up by itself that was paid: failures are counted anew.
CREATE OR REPLACE FUNCTION forgive_failures() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE auto_topups SET failures = 0, note = '' WHERE wallet_id = NEW.wallet_id AND failures > 0 AND enabled;
    RETURN NULL;
END $$;
