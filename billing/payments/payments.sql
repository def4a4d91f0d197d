-- Money that a payment provider's API says was paid: applied once, and again at any time without effect.

-- Apply that a payment succeeded: once, whoever says so and how often. Only what agrees with its intent in provider, currency
-- and amount reaches the wallet; anything else goes to suspense, for an operator to decide. p_more: this provider may take
-- more than was asked (its fee); what was asked is credited. Verdicts: 'credited', 'review', 'known'.
CREATE OR REPLACE FUNCTION credit_payment(
    p_tx uuid, p_provider text, p_txn text, p_intent uuid, p_currency text, p_paid bigint, p_more boolean
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    wish  payment_intents;
    why   text;
    given bigint := 0;
BEGIN
    PERFORM 1 FROM wallets w WHERE w.id = (SELECT i.wallet_id FROM payment_intents i WHERE i.id = p_intent) FOR NO KEY UPDATE;
    SELECT * INTO wish FROM payment_intents i WHERE i.id = p_intent FOR UPDATE;
    why := CASE
        WHEN wish.id IS NULL THEN 'nobody asked for this payment'
        WHEN wish.provider <> p_provider THEN 'it was asked for at ' || wish.provider
        WHEN wish.currency <> p_currency THEN 'paid in ' || p_currency || ', not ' || wish.currency
        WHEN EXISTS (SELECT FROM payment_credits c WHERE c.intent_id = wish.id AND c.credited_nano > 0
                     AND (c.provider, c.provider_txn_id) <> (p_provider, p_txn)) THEN 'paid twice'
        WHEN p_paid < wish.amount_nano THEN 'less was paid than asked'
        WHEN p_paid > wish.amount_nano AND NOT p_more THEN 'more was paid than asked'
    END;
    IF why IS NULL THEN
        given := wish.amount_nano;
    END IF;
    INSERT INTO payment_credits (provider, provider_txn_id, intent_id, wallet_id, currency, paid_nano, credited_nano, state, note, tx_id)
    VALUES (p_provider, p_txn, wish.id, wish.wallet_id, p_currency, p_paid, given,
            CASE WHEN why IS NULL THEN 'credited' ELSE 'review' END,
            coalesce(why, CASE WHEN p_paid > given THEN 'more was paid than asked; the rest is in suspense' ELSE '' END), p_tx)
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN 'known';
    END IF;
    INSERT INTO journal_tx (id, kind, wallet_id, memo) VALUES (p_tx, 'topup', wish.wallet_id, 'Paid by ' || p_provider);
    PERFORM post_entries(array_agg(p_tx), array_agg(e.seq::smallint), array_agg(e.account), array_agg(e.wallet),
                         array_agg(p_currency), array_agg(e.amount))
    FROM (VALUES (1, 'wallet', wish.wallet_id, given), (2, 'suspense', NULL, p_paid - given),
                 (3, 'psp_clearing', NULL, -p_paid)) AS e (seq, account, wallet, amount)
    WHERE e.amount <> 0;
    UPDATE payment_intents i SET ended_at = now(), poll_at = NULL,
           state = CASE WHEN why IS NULL THEN 'paid' WHEN i.state = 'paid' THEN 'paid' ELSE 'review' END,
           note = CASE WHEN why IS NOT NULL THEN why WHEN i.state = 'expired' THEN 'paid after it expired' ELSE '' END
    WHERE i.id = wish.id;
    IF given > 0 THEN
        PERFORM pg_notify('tuma', 'wallet:' || wish.wallet_id);
    END IF;
    RETURN CASE WHEN why IS NULL THEN 'credited' ELSE 'review' END;
END $$;

-- What the provider kept of a payment, once: the house's expense, in the currency that the provider counts it in.
CREATE OR REPLACE FUNCTION note_payment_fee(p_tx uuid, p_provider text, p_txn text, p_fee bigint, p_currency text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE payment_credits SET fee_nano = p_fee, fee_currency = p_currency
    WHERE provider = p_provider AND provider_txn_id = p_txn AND fee_nano IS NULL;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF p_fee > 0 THEN
        INSERT INTO journal_tx (id, kind, memo) VALUES (p_tx, 'payment_fee', p_provider || ' ' || p_txn);
        PERFORM post_entries(ARRAY[p_tx, p_tx], ARRAY[1, 2]::smallint[], ARRAY['psp_fee', 'psp_clearing'],
                             ARRAY[NULL, NULL]::uuid[], ARRAY[p_currency, p_currency], ARRAY[-p_fee, p_fee]);
    END IF;
    RETURN true;
END $$;

-- Lock a payment's wallet, then the payment itself.
CREATE OR REPLACE FUNCTION lock_payment(p_provider text, p_txn text) RETURNS payment_credits LANGUAGE plpgsql AS $$
DECLARE
    paid payment_credits;
BEGIN
    SELECT * INTO paid FROM payment_credits c WHERE c.provider = p_provider AND c.provider_txn_id = p_txn;
    PERFORM 1 FROM wallets w WHERE w.id = paid.wallet_id FOR NO KEY UPDATE;
    SELECT * INTO paid FROM payment_credits c WHERE c.provider = p_provider AND c.provider_txn_id = p_txn FOR UPDATE;
    RETURN paid;
END $$;

-- What of a payment lies in suspense, and what of it no reversal has taken; nano units.
CREATE OR REPLACE FUNCTION left_of_payment(p_paid payment_credits) RETURNS TABLE (suspense_nano bigint, paid_nano bigint) LANGUAGE sql STABLE AS $$
    SELECT (p_paid.paid_nano - p_paid.credited_nano - coalesce(sum(r.suspense_nano), 0))::bigint,
           (p_paid.paid_nano - coalesce(sum(r.amount_nano), 0))::bigint
    FROM payment_reversals r
    WHERE r.provider = p_paid.provider AND r.provider_txn_id = p_paid.provider_txn_id AND r.state <> 'undone'
$$;

-- An operator gives what lies in suspense to a wallet: the intent's, or the one named. Returns how much. The payment names the
-- transactions that did.
CREATE OR REPLACE FUNCTION accept_payment(p_tx uuid, p_provider text, p_txn text, p_wallet uuid, p_memo text) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    paid payment_credits;
    rest bigint;
    coin text;
BEGIN
    PERFORM 1 FROM wallets w
    WHERE w.id = coalesce(p_wallet, (SELECT c.wallet_id FROM payment_credits c
                                     WHERE c.provider = p_provider AND c.provider_txn_id = p_txn)) FOR NO KEY UPDATE;
    SELECT * INTO paid FROM payment_credits c WHERE c.provider = p_provider AND c.provider_txn_id = p_txn FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no payment % of %', p_txn, p_provider USING ERRCODE = 'no_data_found';
    END IF;
    SELECT l.suspense_nano INTO rest FROM left_of_payment(paid) l;
    SELECT w.currency INTO coin FROM wallets w WHERE w.id = coalesce(p_wallet, paid.wallet_id);
    IF rest <= 0 THEN
        RAISE EXCEPTION 'nothing of this payment is in suspense' USING ERRCODE = 'invalid_parameter_value';
    ELSIF coin IS NULL OR (paid.credited_nano > 0 AND p_wallet <> paid.wallet_id) THEN
        RAISE EXCEPTION 'name the wallet that it is for' USING ERRCODE = 'invalid_parameter_value';
    ELSIF coin <> paid.currency THEN
        RAISE EXCEPTION 'it was paid in %, the wallet is in %', paid.currency, coin USING ERRCODE = 'invalid_parameter_value';
    END IF;
    UPDATE payment_credits SET credited_nano = credited_nano + rest, state = 'resolved', note = p_memo,
           wallet_id = coalesce(p_wallet, wallet_id), accepted_tx_ids = accepted_tx_ids || p_tx
    WHERE provider = p_provider AND provider_txn_id = p_txn;
    INSERT INTO journal_tx (id, kind, wallet_id, memo) VALUES (p_tx, 'topup', coalesce(p_wallet, paid.wallet_id), 'Paid by ' || p_provider);
    PERFORM post_entries(ARRAY[p_tx, p_tx], ARRAY[1, 2]::smallint[], ARRAY['wallet', 'suspense'],
                         ARRAY[coalesce(p_wallet, paid.wallet_id), NULL], ARRAY[coin, coin], ARRAY[rest, -rest]);
    IF paid.wallet_id IS DISTINCT FROM coalesce(p_wallet, paid.wallet_id) THEN -- its disputes are about the other's money now
        PERFORM freeze_for_disputes(paid.wallet_id), freeze_for_disputes(p_wallet);
    END IF;
    UPDATE payment_intents SET state = 'paid' WHERE id = paid.intent_id AND state = 'review' AND wallet_id = coalesce(p_wallet, paid.wallet_id);
    PERFORM pg_notify('tuma', 'wallet:' || coalesce(p_wallet, paid.wallet_id));
    RETURN rest;
END $$;
