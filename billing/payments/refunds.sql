-- Money taken back: refunds of ours, and disputes and refunds from the provider's side.

-- Post what a reversal takes, or, where p_sign is 1, gives back.
CREATE OR REPLACE FUNCTION post_reversal(p_tx uuid, p_of payment_reversals, p_sign integer) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    paid payment_credits;
BEGIN
    SELECT * INTO paid FROM payment_credits c WHERE c.provider = p_of.provider AND c.provider_txn_id = p_of.provider_txn_id;
    INSERT INTO journal_tx (id, kind, wallet_id, memo)
    VALUES (p_tx, CASE p_of.kind WHEN 'refund' THEN 'reversal' ELSE 'dispute' END, paid.wallet_id,
            CASE WHEN p_sign > 0 THEN CASE p_of.kind WHEN 'refund' THEN 'Refund came back' ELSE 'Dispute won' END
                 ELSE CASE p_of.kind WHEN 'refund' THEN 'Payment refunded' ELSE 'Payment disputed' END END || ' (' || p_of.provider || ')');
    PERFORM post_entries(array_agg(p_tx), array_agg(e.seq::smallint), array_agg(e.account), array_agg(e.wallet),
                         array_agg(paid.currency), array_agg(p_sign * e.amount))
    FROM (VALUES (1, 'wallet', paid.wallet_id, p_of.amount_nano - p_of.suspense_nano),
                 (2, 'suspense', NULL, p_of.suspense_nano),
                 (3, 'psp_clearing', NULL, -p_of.amount_nano)) AS e (seq, account, wallet, amount)
    WHERE e.amount <> 0;
    IF paid.wallet_id IS NOT NULL THEN
        PERFORM pg_notify('tuma', 'wallet:' || paid.wallet_id);
    END IF;
END $$;

-- Take a payment's money back: what is in suspense first, then from the wallet, below zero if need be. With nobody's wallet
-- all of it is suspense's.
CREATE OR REPLACE FUNCTION take_back(
    p_id uuid, p_tx uuid, p_paid payment_credits, p_kind text, p_reversal text, p_state text, p_amount bigint, p_reason text
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    made payment_reversals;
BEGIN
    INSERT INTO payment_reversals (id, provider, provider_txn_id, kind, provider_reversal_id, state, amount_nano, suspense_nano,
                                   reason, tx_id, ended_at, poll_at)
    VALUES (p_id, p_paid.provider, p_paid.provider_txn_id, p_kind, p_reversal, p_state, p_amount,
            CASE WHEN p_paid.wallet_id IS NULL OR p_paid.credited_nano = 0 THEN p_amount
                 ELSE least(p_amount, (SELECT greatest(l.suspense_nano, 0) FROM left_of_payment(p_paid) l)) END,
            p_reason, p_tx, CASE WHEN p_state = 'final' THEN now() END, CASE WHEN p_state <> 'final' THEN now() END)
    RETURNING * INTO made;
    PERFORM post_reversal(p_tx, made, -1);
END $$;

-- A dispute freezes its wallet; when the last that was open is won, what it froze is free again. An operator's word stands.
CREATE OR REPLACE FUNCTION freeze_for_disputes(p_wallet uuid) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    open_ones boolean := EXISTS (
        SELECT FROM payment_reversals r JOIN payment_credits c USING (provider, provider_txn_id)
        WHERE c.wallet_id = p_wallet AND r.kind = 'dispute' AND r.state = 'open');
    lost boolean := EXISTS (
        SELECT FROM payment_reversals r JOIN payment_credits c USING (provider, provider_txn_id)
        WHERE c.wallet_id = p_wallet AND r.kind = 'dispute' AND r.state = 'final');
BEGIN
    IF open_ones THEN
        UPDATE wallets SET status = 'frozen', frozen_by = 'dispute', status_reason = 'a payment is disputed'
        WHERE id = p_wallet AND status = 'active';
    ELSIF NOT lost THEN
        UPDATE wallets SET status = 'active', frozen_by = NULL, status_reason = 'the dispute was won'
        WHERE id = p_wallet AND frozen_by = 'dispute';
    END IF;
END $$;

-- Apply what the provider says of a refund or a dispute. A refund of ours is found by its id, by the provider's, or as the
-- one of this amount that the provider has not answered for. Verdicts: 'posted', 'undone', 'noted', 'known'.
CREATE OR REPLACE FUNCTION reverse_payment(
    p_id uuid, p_tx uuid, p_provider text, p_txn text, p_kind text, p_reversal text, p_ours uuid, p_state text, p_amount bigint
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    paid  payment_credits := lock_payment(p_provider, p_txn);
    known payment_reversals;
BEGIN
    IF paid.provider IS NULL THEN
        RAISE EXCEPTION 'no payment % of %', p_txn, p_provider USING ERRCODE = 'no_data_found';
    END IF;
    SELECT * INTO known FROM payment_reversals r
    WHERE r.provider = p_provider AND r.provider_txn_id = p_txn AND r.kind = p_kind
      AND (r.provider_reversal_id = p_reversal OR (r.provider_reversal_id IS NULL AND (r.id = p_ours OR (
           p_ours IS NULL AND r.state = 'requested' AND r.amount_nano = p_amount))))
    ORDER BY (r.provider_reversal_id = p_reversal) DESC NULLS LAST, (r.id = p_ours) DESC NULLS LAST, r.id LIMIT 1;
    IF known.id IS NULL THEN
        IF p_state = 'undone' THEN
            RETURN 'known'; -- it came and went before anybody looked: nothing was posted, nothing is owed
        END IF;
        PERFORM take_back(p_id, p_tx, paid, p_kind, p_reversal, p_state, p_amount, '');
    ELSIF known.amount_nano <> p_amount THEN
        RAISE EXCEPTION '% % of % was % and is % nano', p_kind, p_reversal, p_provider, known.amount_nano, p_amount
            USING ERRCODE = 'integrity_constraint_violation';
    ELSIF known.state IN ('final', 'undone') AND NOT (known.kind = 'refund' AND known.state = 'final' AND p_state = 'undone') THEN
        RETURN 'known'; -- it was looked at later than this, though applied before
    ELSIF known.state = p_state THEN
        RETURN 'known';
    ELSE
        UPDATE payment_reversals SET state = p_state, provider_reversal_id = p_reversal,
               ended_at = CASE WHEN p_state IN ('final', 'undone') THEN now() END,
               poll_at = CASE WHEN p_state = 'open' THEN coalesce(poll_at, now()) END,
               undo_tx_id = CASE WHEN p_state = 'undone' THEN p_tx END
        WHERE id = known.id;
        IF p_state = 'undone' THEN
            PERFORM post_reversal(p_tx, known, 1);
        END IF;
    END IF;
    IF p_kind = 'dispute' AND paid.wallet_id IS NOT NULL THEN
        PERFORM freeze_for_disputes(paid.wallet_id);
    END IF;
    RETURN CASE WHEN known.id IS NULL THEN 'posted' WHEN p_state = 'undone' THEN 'undone' ELSE 'noted' END;
END $$;

-- A dispute that was lost before anybody looked freezes as one that was seen while it was open; an operator's word comes after.
CREATE OR REPLACE FUNCTION freeze_for_lost_dispute() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE wallets w SET status = 'frozen', frozen_by = 'dispute', status_reason = 'a payment was disputed, and the dispute lost'
    FROM payment_credits c
    WHERE (c.provider, c.provider_txn_id) = (NEW.provider, NEW.provider_txn_id) AND w.id = c.wallet_id AND w.status = 'active';
    RETURN NULL;
END $$;

-- Set money aside for a refund of ours, before the provider is asked for it: the wallet cannot spend it meanwhile.
-- NULL for the amount: all that is left. Refused where more is asked than is left of the payment (invalid_parameter_value), or
-- more than the wallet has, unless it may go below zero (check_violation).
CREATE OR REPLACE FUNCTION begin_refund(
    p_id uuid, p_tx uuid, p_provider text, p_txn text, p_amount bigint, p_reason text, p_below_zero boolean
) RETURNS payment_reversals LANGUAGE plpgsql AS $$
DECLARE
    paid payment_credits := lock_payment(p_provider, p_txn);
    rest bigint;
    made payment_reversals;
    have bigint;
BEGIN
    IF paid.provider IS NULL THEN
        RAISE EXCEPTION 'no payment % of %', p_txn, p_provider USING ERRCODE = 'no_data_found';
    END IF;
    SELECT l.paid_nano INTO rest FROM left_of_payment(paid) l;
    IF coalesce(p_amount, rest) > rest OR coalesce(p_amount, rest) <= 0 THEN
        RAISE EXCEPTION 'of this payment % is left', major_text(greatest(rest, 0)) USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM take_back(p_id, p_tx, paid, 'refund', NULL, 'requested', coalesce(p_amount, rest), p_reason);
    SELECT * INTO made FROM payment_reversals r WHERE r.id = p_id;
    SELECT w.posted_nano - w.held_nano INTO have FROM wallets w WHERE w.id = paid.wallet_id;
    IF have < 0 AND made.amount_nano > made.suspense_nano AND NOT p_below_zero THEN
        RAISE EXCEPTION 'the wallet does not have as much' USING ERRCODE = 'check_violation';
    END IF;
    RETURN made;
END $$;

-- Set money aside for a refund of ours, as begin_refund does, once per key: a repeat returns the first; with another input it
-- is refused (unique_violation). The payment's wallet and the payment are locked before the key is looked up.
CREATE OR REPLACE FUNCTION refund_payment(
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

-- Reversals to ask the provider about, as intents are taken.
CREATE OR REPLACE FUNCTION take_reversals(p_limit integer, p_lease interval, p_pause interval)
RETURNS SETOF payment_reversals LANGUAGE sql AS $$
    UPDATE payment_reversals r SET polls = r.polls + 1,
           poll_at = now() + greatest(p_lease, least(p_pause * power(2, least(r.polls, 20)), interval '1 hour'))
    FROM (SELECT d.id FROM payment_reversals d WHERE d.poll_at <= now() ORDER BY d.poll_at LIMIT p_limit
          FOR UPDATE SKIP LOCKED) due
    WHERE r.id = due.id AND r.state IN ('requested', 'open') RETURNING r.*
$$;

-- Take one reversal to ask the provider about it now, unless another process has it: then none is returned.
CREATE OR REPLACE FUNCTION take_reversal(p_id uuid, p_lease interval) RETURNS SETOF payment_reversals LANGUAGE sql AS $$
    UPDATE payment_reversals r SET polls = r.polls + 1, poll_at = now() + p_lease
    WHERE r.id = p_id AND r.poll_at <= now() AND r.state IN ('requested', 'open') RETURNING r.*
$$;

-- Whether a refund of ours is still one that the provider has not told of.
CREATE OR REPLACE FUNCTION is_refund_requested(p_id uuid) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM payment_reversals r WHERE r.id = p_id AND r.state = 'requested')
$$;

-- Say before a refund is sent that it is: true for whoever may send it. Committed before the provider is asked, it stands whatever
-- becomes of the answer.
CREATE OR REPLACE FUNCTION begin_sending(p_id uuid) RETURNS boolean LANGUAGE sql AS $$
    WITH begun AS (
        UPDATE payment_reversals SET sent_at = now() WHERE id = p_id AND state = 'requested' AND sent_at IS NULL RETURNING id
    )
    SELECT EXISTS (SELECT FROM begun)
$$;

-- It certainly did not reach the provider, so it may be sent again.
CREATE OR REPLACE FUNCTION was_not_sent(p_id uuid) RETURNS void LANGUAGE sql AS $$
    UPDATE payment_reversals SET sent_at = NULL WHERE id = p_id AND state = 'requested'
$$;

-- An operator has looked at the provider's own pages: it is not there. True where it is one that may have been sent, by a worker
-- that has given it up since: one that is about it just now (WORK_MAX_S at most) would send it beside the next.
CREATE OR REPLACE FUNCTION send_again(p_id uuid) RETURNS boolean LANGUAGE sql AS $$
    WITH freed AS (
        UPDATE payment_reversals SET sent_at = NULL, poll_at = now()
        WHERE id = p_id AND state = 'requested' AND sent_at < now() - interval '2 minutes' RETURNING id
    )
    SELECT EXISTS (SELECT FROM freed)
$$;
