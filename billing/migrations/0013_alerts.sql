-- What operators are told by webhook, and what a charge is explained by.

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

-- What the other columns do not tell exactly: a cost that the provider names more finely than nano-dollars, and the parts of
-- a prompt that are priced apart.
ALTER TABLE usage
    ADD COLUMN cost_attousd numeric(40, 0) CHECK (cost_attousd >= 0),
    ADD COLUMN images       bigint NOT NULL DEFAULT 0,
    ADD COLUMN audio_tokens bigint NOT NULL DEFAULT 0;

-- settle_batch, for a batch in which calls need those columns: p_exact names the calls.
CREATE FUNCTION settle_batch(
    p_batch uuid, p_id uuid[], p_state text[], p_outcome text[], p_accuracy text[], p_source text[], p_generation text[],
    p_cost bigint[], p_provider_cost bigint[], p_charge bigint[], p_spread bigint[], p_house bigint[],
    p_prompt bigint[], p_completion bigint[], p_cached_read bigint[], p_cached_write bigint[], p_reasoning bigint[],
    p_first_byte_ms integer[], p_duration_ms integer[],
    p_exact uuid[], p_exact_cost numeric[], p_images bigint[], p_audio bigint[]
) RETURNS TABLE (call_id uuid, won boolean, state text, charge_nano bigint, hold_nano bigint, posted_nano bigint, available_nano bigint)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    ended   record;
    winners uuid[] := '{}';
BEGIN
    FOR ended IN SELECT * FROM settle_batch(
        p_batch, p_id, p_state, p_outcome, p_accuracy, p_source, p_generation, p_cost, p_provider_cost, p_charge, p_spread,
        p_house, p_prompt, p_completion, p_cached_read, p_cached_write, p_reasoning, p_first_byte_ms, p_duration_ms)
    LOOP
        IF ended.won THEN
            winners := winners || ended.call_id;
        END IF;
        call_id := ended.call_id; won := ended.won; state := ended.state; charge_nano := ended.charge_nano;
        hold_nano := ended.hold_nano; posted_nano := ended.posted_nano; available_nano := ended.available_nano;
        RETURN NEXT;
    END LOOP;
    UPDATE usage u SET cost_attousd = e.cost, images = e.images, audio_tokens = e.audio
    FROM unnest(p_exact, p_exact_cost, p_images, p_audio) AS e (id, cost, images, audio)
    JOIN unnest(winners) AS w (id) ON w.id = e.id
    WHERE u.call_id = e.id;
END $$;
