-- What an operator does with payments: a refund once per key, an acceptance that can be found again, a webhook looked at anew.

ALTER TABLE payment_credits ADD COLUMN accepted_tx_ids uuid[] NOT NULL DEFAULT '{}'; -- what gave its suspense to a wallet
SELECT audit_table('payment_credits', '{provider,provider_txn_id}');
CREATE INDEX journal_tx_payment_fees ON journal_tx (memo) WHERE kind = 'payment_fee';

-- Set money aside for a refund of ours, as begin_refund does, once per key: a repeat returns the first; with another input it
-- is refused (unique_violation). The payment's wallet and the payment are locked before the key is looked up.
CREATE FUNCTION refund_payment(
    p_id uuid, p_tx uuid, p_provider text, p_txn text, p_amount bigint, p_reason text, p_below_zero boolean, p_key text, p_hash bytea
) RETURNS payment_reversals LANGUAGE plpgsql AS $$
DECLARE
    first posting_keys;
    made  payment_reversals;
BEGIN
    PERFORM lock_payment(p_provider, p_txn);
    SELECT * INTO first FROM posting_keys k WHERE k.key = p_key;
    IF first.key IS NULL THEN
        made := begin_refund(p_id, p_tx, p_provider, p_txn, p_amount, p_reason, p_below_zero);
        INSERT INTO posting_keys (key, input_hash, tx_id) VALUES (p_key, p_hash, p_tx);
        RETURN made;
    END IF;
    SELECT * INTO made FROM payment_reversals r WHERE r.tx_id = first.tx_id;
    IF first.input_hash <> p_hash OR made.id IS NULL THEN
        RAISE EXCEPTION 'idempotency key % was used with another input', p_key USING ERRCODE = 'unique_violation';
    END IF;
    RETURN made;
END $$;

-- Take one reversal to ask the provider about it now, unless another process has it: then none is returned.
CREATE FUNCTION take_reversal(p_id uuid, p_lease interval) RETURNS SETOF payment_reversals LANGUAGE sql AS $$
    UPDATE payment_reversals r SET polls = r.polls + 1, poll_at = now() + p_lease
    WHERE r.id = p_id AND r.poll_at <= now() AND r.state IN ('requested', 'open') RETURNING r.*
$$;

-- Whether a refund of ours is still one that the provider has not told of.
CREATE FUNCTION is_refund_requested(p_id uuid) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM payment_reversals r WHERE r.id = p_id AND r.state = 'requested')
$$;

-- A webhook that ended without effect is due again, as if it had just come. False: it has not ended so, or is none.
CREATE FUNCTION retry_webhook(p_id uuid) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE webhook_events SET state = 'new', note = '', tries = 0, next_at = now(), ended_at = NULL
    WHERE id = p_id AND state IN ('review', 'ignored');
    RETURN FOUND;
END $$;

-- As before; the payment now names the transactions that gave its suspense to a wallet.
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

-- A dispute that was lost before anybody looked freezes as one that was seen while it was open; an operator's word comes after.
CREATE FUNCTION freeze_for_lost_dispute() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE wallets w SET status = 'frozen', frozen_by = 'dispute', status_reason = 'a payment was disputed, and the dispute lost'
    FROM payment_credits c
    WHERE (c.provider, c.provider_txn_id) = (NEW.provider, NEW.provider_txn_id) AND w.id = c.wallet_id AND w.status = 'active';
    RETURN NULL;
END $$;
CREATE TRIGGER payment_reversals_lost AFTER INSERT ON payment_reversals FOR EACH ROW
    WHEN (NEW.kind = 'dispute' AND NEW.state = 'final') EXECUTE FUNCTION freeze_for_lost_dispute();
