-- What operators are told by webhook.

-- An alert is one condition from its beginning to its end. told_at: when its latest message was written; NULL, if nobody
-- is to be told.
CREATE TABLE alerts (
    id          uuid PRIMARY KEY,
    kind        text NOT NULL,
    subject     text NOT NULL, -- what has the condition: a wallet, a currency; '' where there is one of it
    severity    text NOT NULL CHECK (severity IN ('warning', 'critical')),
    state       text NOT NULL DEFAULT 'firing' CHECK (state IN ('firing', 'resolved')),
    summary     text NOT NULL,
    detail      jsonb NOT NULL,
    started_at  timestamptz NOT NULL DEFAULT now(),
    seen_at     timestamptz NOT NULL DEFAULT now(),
    told_at     timestamptz,
    resolved_at timestamptz
);
CREATE UNIQUE INDEX alerts_firing ON alerts (kind, subject) WHERE state = 'firing'; -- one per condition while it lasts

-- Messages to be delivered, written with what they tell of: a process that dies before it has delivered one leaves it here.
-- body: the bytes that are sent, the same at each try. next_at: when it may be tried by whoever takes it.
CREATE TABLE alert_messages (
    id           uuid PRIMARY KEY,
    alert_id     uuid REFERENCES alerts,
    event_id     bigint UNIQUE, -- the event of a user's that it tells of
    body         text NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    next_at      timestamptz NOT NULL DEFAULT now(),
    tries        integer NOT NULL DEFAULT 0,
    delivered_at timestamptz,
    dropped_at   timestamptz, -- nobody took it for too long
    last_error   text NOT NULL DEFAULT ''
);
CREATE INDEX alert_messages_due ON alert_messages (next_at) WHERE delivered_at IS NULL AND dropped_at IS NULL;
CREATE INDEX alert_messages_waiting ON alert_messages (alert_id, id) WHERE delivered_at IS NULL AND dropped_at IS NULL;

-- What is looked for at each evaluation.
CREATE INDEX events_of_caps ON events (created_at) WHERE kind = 'cap.spent';
CREATE INDEX payment_credits_review ON payment_credits (created_at) WHERE state = 'review';
CREATE INDEX webhook_events_review ON webhook_events (received_at) WHERE state = 'review';

-- Below this balance the owner wants to be told; NULL: never.
ALTER TABLE wallets ADD COLUMN low_nano bigint CHECK (low_nano >= 0);
SELECT audit_table('wallets', '{id}', '{posted_nano,held_nano,capped}');
CREATE INDEX wallets_watched ON wallets (id) WHERE low_nano IS NOT NULL;
CREATE FUNCTION own_set_low(p_wallet uuid, p_low bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE wallets w SET low_nano = p_low WHERE w.id = p_wallet AND w.user_id = require_person();
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no wallet %', p_wallet USING ERRCODE = 'no_data_found';
    END IF;
END $$;
