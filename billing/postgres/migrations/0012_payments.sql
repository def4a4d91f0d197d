-- Money from people: what was asked of a payment provider, what it says was paid, and what was taken back. A provider's
-- webhook is only a hint: everything here is applied from what its API answers, and may be applied again at any time.

ALTER TABLE journal_tx DROP CONSTRAINT journal_tx_kind_check;
ALTER TABLE journal_tx ADD CONSTRAINT journal_tx_kind_check CHECK (kind IN (
    'settlement', 'grant', 'topup', 'refund', 'correction', 'house_loss', 'reversal', 'dispute', 'payment_fee'));
ALTER TABLE journal_entry DROP CONSTRAINT journal_entry_account_check;
ALTER TABLE journal_entry ADD CONSTRAINT journal_entry_account_check CHECK (account IN (
    'wallet', 'psp_clearing', 'psp_fee', 'grant', 'revenue', 'fx_position', 'fx_spread', 'provider_prepaid', 'provider_cost',
    'house_loss', 'suspense'));
CREATE INDEX journal_tx_payments ON journal_tx (id) WHERE kind IN ('topup', 'reversal', 'dispute'); -- I5, over all days

-- frozen_by: an operator's word stands when a dispute ends.
ALTER TABLE wallets ADD COLUMN frozen_by text CHECK (frozen_by IN ('operator', 'dispute'));
UPDATE wallets SET frozen_by = 'operator' WHERE status = 'frozen';
SELECT audit_table('wallets', '{id}', '{posted_nano,held_nano,capped}');
CREATE OR REPLACE FUNCTION set_wallet(p_wallet uuid, p_status text, p_overdraft bigint, p_reason text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE wallets w SET status = coalesce(p_status, w.status), overdraft_nano = coalesce(p_overdraft, w.overdraft_nano),
           frozen_by = CASE p_status WHEN 'frozen' THEN 'operator' WHEN 'active' THEN NULL ELSE w.frozen_by END,
           status_reason = CASE WHEN p_status IS NULL THEN w.status_reason ELSE coalesce(p_reason, '') END
    WHERE w.id = p_wallet;
    RETURN FOUND;
END $$;

-- A wish to pay. creating: the provider has not answered yet. failed and expired are not the end of money: what arrives
-- all the same is credited. attempt: how often a page was asked for. poll_at: when to ask the provider next.
CREATE TABLE payment_intents (
    id              uuid PRIMARY KEY,
    wallet_id       uuid NOT NULL REFERENCES wallets,
    user_id         uuid NOT NULL REFERENCES users,
    kind            text NOT NULL CHECK (kind IN ('topup', 'auto')),
    provider        text NOT NULL CHECK (provider IN ('stripe', 'paystack', 'flutterwave')),
    currency        text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    amount_nano     bigint NOT NULL CHECK (amount_nano > 0),
    state           text NOT NULL DEFAULT 'creating'
                    CHECK (state IN ('creating', 'pending', 'failed', 'expired', 'paid', 'review')),
    attempt         integer NOT NULL DEFAULT 1,
    provider_id     text,
    url             text,
    note            text NOT NULL DEFAULT '',
    idempotency_key text,
    created_at      timestamptz NOT NULL DEFAULT now(),
    expires_at      timestamptz NOT NULL,
    ended_at        timestamptz,
    poll_at         timestamptz,
    polls           integer NOT NULL DEFAULT 0,
    UNIQUE (wallet_id, idempotency_key)
);
CREATE INDEX payment_intents_wallet ON payment_intents (wallet_id, id);
CREATE INDEX payment_intents_due ON payment_intents (poll_at) WHERE poll_at IS NOT NULL;

-- Money that the provider's API says was paid: once per transaction of the provider. What of it no wallet could be given
-- lies in suspense until an operator decides.
CREATE TABLE payment_credits (
    provider        text NOT NULL,
    provider_txn_id text NOT NULL,
    intent_id       uuid REFERENCES payment_intents,
    wallet_id       uuid REFERENCES wallets,
    currency        text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    paid_nano       bigint NOT NULL CHECK (paid_nano > 0),
    credited_nano   bigint NOT NULL CHECK (credited_nano BETWEEN 0 AND paid_nano),
    state           text NOT NULL CHECK (state IN ('credited', 'review', 'resolved')),
    note            text NOT NULL DEFAULT '',
    fee_nano        bigint CHECK (fee_nano >= 0),
    fee_currency    text CHECK (fee_currency ~ '^[A-Z]{3}$'),
    tx_id           uuid NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (provider, provider_txn_id)
);
CREATE INDEX payment_credits_intent ON payment_credits (intent_id);
CREATE INDEX payment_credits_wallet ON payment_credits (wallet_id);

-- Money taken back, by us or from the provider's side. requested: ours, and the provider has not answered; open: a refund on
-- its way, a dispute; final: it stays so; undone: the money is ours again. Neither of the last two changes any more.
CREATE TABLE payment_reversals (
    id                   uuid PRIMARY KEY,
    provider             text NOT NULL,
    provider_txn_id      text NOT NULL,
    kind                 text NOT NULL CHECK (kind IN ('refund', 'dispute')),
    provider_reversal_id text,
    state                text NOT NULL CHECK (state IN ('requested', 'open', 'final', 'undone')),
    amount_nano          bigint NOT NULL CHECK (amount_nano > 0),
    suspense_nano        bigint NOT NULL CHECK (suspense_nano BETWEEN 0 AND amount_nano), -- the part that no wallet pays
    reason               text NOT NULL DEFAULT '',
    tx_id                uuid NOT NULL,
    undo_tx_id           uuid,
    created_at           timestamptz NOT NULL DEFAULT now(),
    ended_at             timestamptz,
    poll_at              timestamptz,
    polls                integer NOT NULL DEFAULT 0,
    FOREIGN KEY (provider, provider_txn_id) REFERENCES payment_credits,
    UNIQUE (provider, kind, provider_reversal_id)
);
CREATE INDEX payment_reversals_of ON payment_reversals (provider, provider_txn_id);
CREATE INDEX payment_reversals_due ON payment_reversals (poll_at) WHERE poll_at IS NOT NULL;

-- What providers sent, raw and once, its signature checked. next_at: when it may be looked at, by whoever takes it.
CREATE TABLE webhook_events (
    id          uuid PRIMARY KEY,
    provider    text NOT NULL,
    event_key   text NOT NULL, -- the provider's id of the event; the body's SHA-256, where it has none
    body        text NOT NULL,
    state       text NOT NULL DEFAULT 'new' CHECK (state IN ('new', 'done', 'ignored', 'review')),
    deliveries  integer NOT NULL DEFAULT 1,
    tries       integer NOT NULL DEFAULT 0,
    note        text NOT NULL DEFAULT '',
    received_at timestamptz NOT NULL DEFAULT now(),
    next_at     timestamptz NOT NULL DEFAULT now(),
    ended_at    timestamptz,
    UNIQUE (provider, event_key)
);
CREATE INDEX webhook_events_due ON webhook_events (next_at) WHERE state = 'new';

SELECT audit_table('payment_intents', '{id}', '{poll_at,polls}'),
       audit_table('payment_credits', '{provider,provider_txn_id}'),
       audit_table('payment_reversals', '{id}', '{poll_at,polls}');

-- Intents.

-- Note a person's wish to pay into their wallet. With an idempotency key, a repeat returns the first intent; with another
-- input it is refused (unique_violation).
CREATE FUNCTION own_create_intent(
    p_id uuid, p_wallet uuid, p_provider text, p_currency text, p_amount bigint, p_key text, p_expires interval, p_poll interval
) RETURNS payment_intents LANGUAGE plpgsql AS $$
DECLARE
    purse wallets;
    made  payment_intents;
BEGIN
    SELECT * INTO purse FROM wallets w WHERE w.id = p_wallet AND w.user_id = require_person();
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no wallet %', p_wallet USING ERRCODE = 'no_data_found';
    END IF;
    IF purse.currency <> p_currency THEN
        RAISE EXCEPTION 'this wallet is in %', purse.currency USING ERRCODE = 'invalid_parameter_value';
    END IF;
    INSERT INTO payment_intents (id, wallet_id, user_id, kind, provider, currency, amount_nano, idempotency_key, expires_at, poll_at)
    VALUES (p_id, purse.id, purse.user_id, 'topup', p_provider, p_currency, p_amount, p_key, now() + p_expires, now() + p_poll)
    ON CONFLICT (wallet_id, idempotency_key) DO NOTHING;
    SELECT * INTO made FROM payment_intents i
    WHERE i.id = p_id OR (i.wallet_id = p_wallet AND i.idempotency_key = p_key);
    IF (made.provider, made.currency, made.amount_nano) <> (p_provider, p_currency, p_amount) THEN
        RAISE EXCEPTION 'idempotency key % was used with another input', p_key USING ERRCODE = 'unique_violation';
    END IF;
    RETURN made;
END $$;

-- The provider has a page for it, or refused one. False: it is past that already.
CREATE FUNCTION note_page(p_id uuid, p_provider_id text, p_url text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE payment_intents SET state = 'pending', provider_id = p_provider_id, url = p_url
    WHERE id = p_id AND state IN ('creating', 'pending');
    RETURN FOUND;
END $$;
-- A page whose making nobody heard of is asked for again, under another reference. Returns the number of the attempt.
CREATE FUNCTION try_page_again(p_id uuid, p_attempt integer) RETURNS integer LANGUAGE plpgsql AS $$
BEGIN
    UPDATE payment_intents SET attempt = attempt + 1 WHERE id = p_id AND state = 'creating' AND attempt = p_attempt;
    RETURN (SELECT i.attempt FROM payment_intents i WHERE i.id = p_id);
END $$;
-- It failed or expired, as far as is known now. Money that was paid is not forgotten by it.
CREATE FUNCTION end_intent(p_id uuid, p_state text, p_note text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE payment_intents SET state = p_state, note = p_note, ended_at = now()
    WHERE id = p_id AND p_state IN ('failed', 'expired') AND state IN ('creating', 'pending', 'failed') AND state <> p_state;
    RETURN FOUND;
END $$;
-- Intents whose payment nobody has told of, each to one process: who takes one has it for `p_lease`. The pauses between two
-- questions double, from `p_pause` to an hour; `p_late` after it expired it is asked about no more.
CREATE FUNCTION take_intents(p_limit integer, p_lease interval, p_pause interval, p_late interval)
RETURNS SETOF payment_intents LANGUAGE sql AS $$
    UPDATE payment_intents i SET polls = i.polls + 1,
           poll_at = CASE WHEN i.state IN ('paid', 'review') OR now() > i.expires_at + p_late THEN NULL
                          ELSE now() + greatest(p_lease, least(p_pause * power(2, least(i.polls, 20)), interval '1 hour')) END
    FROM (SELECT d.id FROM payment_intents d WHERE d.poll_at <= now() ORDER BY d.poll_at LIMIT p_limit
          FOR UPDATE SKIP LOCKED) due
    WHERE i.id = due.id RETURNING i.*
$$;
CREATE FUNCTION find_intent(p_id uuid) RETURNS SETOF payment_intents LANGUAGE sql STABLE AS $$
    SELECT i.* FROM payment_intents i WHERE i.id = p_id
$$;

-- Webhooks.

-- Keep what a provider sent; false: it is there already.
CREATE FUNCTION receive_webhook(p_id uuid, p_provider text, p_key text, p_body text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO webhook_events (id, provider, event_key, body) VALUES (p_id, p_provider, p_key, p_body)
    ON CONFLICT (provider, event_key) DO NOTHING;
    IF FOUND THEN
        RETURN true;
    END IF;
    UPDATE webhook_events SET deliveries = deliveries + 1 WHERE provider = p_provider AND event_key = p_key;
    RETURN false;
END $$;
-- Events that are due, each to one process for as long as `p_lease`, doubled with every try up to an hour.
CREATE FUNCTION take_webhooks(p_limit integer, p_lease interval) RETURNS SETOF webhook_events LANGUAGE sql AS $$
    UPDATE webhook_events e SET tries = e.tries + 1,
           next_at = now() + least(p_lease * power(2, least(e.tries, 20)), interval '1 hour')
    FROM (SELECT d.id FROM webhook_events d WHERE d.state = 'new' AND d.next_at <= now() ORDER BY d.next_at LIMIT p_limit
          FOR UPDATE SKIP LOCKED) due
    WHERE e.id = due.id RETURNING e.*
$$;
CREATE FUNCTION end_webhook(p_id uuid, p_state text, p_note text) RETURNS void LANGUAGE sql AS $$
    UPDATE webhook_events SET state = p_state, note = p_note, ended_at = now() WHERE id = p_id AND state = 'new'
$$;

-- Money.

-- Apply that a payment succeeded: once, whoever says so and how often. Only what agrees with its intent in provider, currency
-- and amount reaches the wallet; anything else goes to suspense, for an operator to decide. p_more: this provider may take
-- more than was asked (its fee); what was asked is credited. Verdicts: 'credited', 'review', 'known'.
CREATE FUNCTION credit_payment(
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
CREATE FUNCTION note_payment_fee(p_tx uuid, p_provider text, p_txn text, p_fee bigint, p_currency text) RETURNS boolean LANGUAGE plpgsql AS $$
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

-- Post what a reversal takes, or, where p_sign is 1, gives back.
CREATE FUNCTION post_reversal(p_tx uuid, p_of payment_reversals, p_sign integer) RETURNS void LANGUAGE plpgsql AS $$
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

-- What of a payment lies in suspense, and what of it no reversal has taken; nano units.
CREATE FUNCTION left_of_payment(p_paid payment_credits) RETURNS TABLE (suspense_nano bigint, paid_nano bigint) LANGUAGE sql STABLE AS $$
    SELECT (p_paid.paid_nano - p_paid.credited_nano - coalesce(sum(r.suspense_nano), 0))::bigint,
           (p_paid.paid_nano - coalesce(sum(r.amount_nano), 0))::bigint
    FROM payment_reversals r
    WHERE r.provider = p_paid.provider AND r.provider_txn_id = p_paid.provider_txn_id AND r.state <> 'undone'
$$;

-- Take a payment's money back: what is in suspense first, then from the wallet, below zero if need be. With nobody's wallet
-- all of it is suspense's.
CREATE FUNCTION take_back(
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

-- Lock a payment's wallet, then the payment itself.
CREATE FUNCTION lock_payment(p_provider text, p_txn text) RETURNS payment_credits LANGUAGE plpgsql AS $$
DECLARE
    paid payment_credits;
BEGIN
    SELECT * INTO paid FROM payment_credits c WHERE c.provider = p_provider AND c.provider_txn_id = p_txn;
    PERFORM 1 FROM wallets w WHERE w.id = paid.wallet_id FOR NO KEY UPDATE;
    SELECT * INTO paid FROM payment_credits c WHERE c.provider = p_provider AND c.provider_txn_id = p_txn FOR UPDATE;
    RETURN paid;
END $$;

-- A dispute freezes its wallet; when the last that was open is won, what it froze is free again. An operator's word stands.
CREATE FUNCTION freeze_for_disputes(p_wallet uuid) RETURNS void LANGUAGE plpgsql AS $$
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
CREATE FUNCTION reverse_payment(
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

-- Set money aside for a refund of ours, before the provider is asked for it: the wallet cannot spend it meanwhile.
-- NULL for the amount: all that is left. Refused where more is asked than is left of the payment (invalid_parameter_value), or
-- more than the wallet has, unless it may go below zero (check_violation).
CREATE FUNCTION begin_refund(
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
-- Reversals to ask the provider about, as intents are taken.
CREATE FUNCTION take_reversals(p_limit integer, p_lease interval, p_pause interval)
RETURNS SETOF payment_reversals LANGUAGE sql AS $$
    UPDATE payment_reversals r SET polls = r.polls + 1,
           poll_at = now() + greatest(p_lease, least(p_pause * power(2, least(r.polls, 20)), interval '1 hour'))
    FROM (SELECT d.id FROM payment_reversals d WHERE d.poll_at <= now() ORDER BY d.poll_at LIMIT p_limit
          FOR UPDATE SKIP LOCKED) due
    WHERE r.id = due.id AND r.state IN ('requested', 'open') RETURNING r.*
$$;

-- An operator gives what lies in suspense to a wallet: the intent's, or the one named. Returns how much.
CREATE FUNCTION accept_payment(p_tx uuid, p_provider text, p_txn text, p_wallet uuid, p_memo text) RETURNS bigint LANGUAGE plpgsql AS $$
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
           wallet_id = coalesce(p_wallet, wallet_id) WHERE provider = p_provider AND provider_txn_id = p_txn;
    INSERT INTO journal_tx (id, kind, wallet_id, memo) VALUES (p_tx, 'topup', coalesce(p_wallet, paid.wallet_id), 'Paid by ' || p_provider);
    PERFORM post_entries(ARRAY[p_tx, p_tx], ARRAY[1, 2]::smallint[], ARRAY['wallet', 'suspense'],
                         ARRAY[coalesce(p_wallet, paid.wallet_id), NULL], ARRAY[coin, coin], ARRAY[rest, -rest]);
    UPDATE payment_intents SET state = 'paid' WHERE id = paid.intent_id AND state = 'review' AND wallet_id = coalesce(p_wallet, paid.wallet_id);
    PERFORM pg_notify('tuma', 'wallet:' || coalesce(p_wallet, paid.wallet_id));
    RETURN rest;
END $$;
