-- The tables of a new database: what the first eighteen migrations came to, hence the number.
--
-- Money at rest is bigint nano units (1e-9 of the currency beside it); prices and rates are numeric. Ids are UUIDv7, made by the caller, so that the big tables can be partitioned by time through their ids.

CREATE TABLE users (
    id               uuid PRIMARY KEY,
    email            text,
    status           text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'disabled')),
    created_at       timestamptz NOT NULL DEFAULT now(),
    timezone         text NOT NULL DEFAULT 'UTC', -- an IANA name
    week_starts      smallint NOT NULL DEFAULT 1 CHECK (week_starts BETWEEN 1 AND 7), -- ISO 8601: 1 is Monday
    requests_per_min bigint CHECK (requests_per_min > 0),
    tokens_per_min   bigint CHECK (tokens_per_min > 0),
    calls_in_flight  bigint CHECK (calls_in_flight > 0),
    subject          text UNIQUE CHECK (length(subject) BETWEEN 1 AND 255), -- `sub` of their identity provider's tokens
    signed_in_at     timestamptz -- first
);
CREATE UNIQUE INDEX users_email ON users (lower(email));

-- posted: the sum of the wallet's journal entries (I2). held: the sum of hold_nano over its live calls (I6).
CREATE TABLE wallets (
    id             uuid PRIMARY KEY,
    user_id        uuid NOT NULL REFERENCES users,
    currency       text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    posted_nano    bigint NOT NULL DEFAULT 0,
    held_nano      bigint NOT NULL DEFAULT 0 CHECK (held_nano >= 0),
    overdraft_nano bigint NOT NULL DEFAULT 0 CHECK (overdraft_nano >= 0),
    status         text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'frozen')),
    created_at     timestamptz NOT NULL DEFAULT now(),
    -- Whether any cap is set on the wallet, one of its keys or its user: calls of other wallets pay nothing for caps.
    capped         boolean NOT NULL DEFAULT false,
    status_reason  text NOT NULL DEFAULT '', -- why it was frozen, or let go again; for operators
    frozen_by      text CHECK (frozen_by IN ('operator', 'dispute')), -- an operator's word stands when a dispute ends
    low_nano       bigint CHECK (low_nano >= 0) -- below this balance the owner wants to be told; NULL: never
) WITH (fillfactor = 50); -- the hot rows: room for HOT updates
CREATE INDEX wallets_user ON wallets (user_id);
CREATE INDEX wallets_watched ON wallets (id) WHERE low_nano IS NOT NULL;

CREATE TABLE api_keys (
    id                 uuid PRIMARY KEY,
    wallet_id          uuid NOT NULL REFERENCES wallets,
    name               text NOT NULL DEFAULT '',
    hint               text NOT NULL, -- the secret's first characters, to recognise it by
    secret_hmac        bytea NOT NULL UNIQUE,
    requests_per_min   bigint CHECK (requests_per_min > 0),
    tokens_per_min     bigint CHECK (tokens_per_min > 0),
    calls_in_flight    bigint CHECK (calls_in_flight > 0),
    created_at         timestamptz NOT NULL DEFAULT now(),
    revoked_at         timestamptz,
    pepper             text,         -- the name of the pepper under secret_hmac; NULL: from before peppers had names
    previous_hmac      bytea UNIQUE, -- the secret before a rotation, good until previous_until
    previous_until     timestamptz,
    rotated_at         timestamptz,
    expires_at         timestamptz,
    models             text[] CHECK (cardinality(models) > 0),   -- ids, or beginnings of ids that end with *; NULL: all
    networks           cidr[] CHECK (cardinality(networks) > 0), -- where it may be used from; NULL: anywhere
    manages            boolean NOT NULL DEFAULT true,            -- whether it may manage keys and caps
    last_used_at       timestamptz, -- to the minute
    CHECK ((previous_hmac IS NULL) = (previous_until IS NULL)),
    -- A key that is bound in any way manages nothing: it would make itself one that is not.
    CONSTRAINT api_keys_bound CHECK (NOT manages OR (
        expires_at IS NULL AND models IS NULL AND networks IS NULL
        AND requests_per_min IS NULL AND tokens_per_min IS NULL AND calls_in_flight IS NULL))
);
CREATE INDEX api_keys_wallet ON api_keys (wallet_id);

CREATE TABLE models (
    id                    text PRIMARY KEY,
    name                  text NOT NULL,
    context_tokens        bigint,
    completion_tokens_max bigint,
    created_at            timestamptz NOT NULL DEFAULT now(),
    synced_at             timestamptz
);

-- Prices in USD per single token, image or request. A row is closed by valid_to, never changed.
CREATE TABLE model_prices (
    id               uuid PRIMARY KEY,
    model_id         text NOT NULL REFERENCES models,
    prompt_usd       numeric(30, 18) NOT NULL CHECK (prompt_usd >= 0),
    completion_usd   numeric(30, 18) NOT NULL CHECK (completion_usd >= 0),
    cached_read_usd  numeric(30, 18) CHECK (cached_read_usd >= 0),
    cached_write_usd numeric(30, 18) CHECK (cached_write_usd >= 0),
    reasoning_usd    numeric(30, 18) CHECK (reasoning_usd >= 0),
    image_usd        numeric(30, 18) NOT NULL DEFAULT 0 CHECK (image_usd >= 0),
    audio_usd        numeric(30, 18) CHECK (audio_usd >= 0),
    request_usd      numeric(30, 18) NOT NULL DEFAULT 0 CHECK (request_usd >= 0),
    source           text NOT NULL,
    valid_from       timestamptz NOT NULL DEFAULT now(),
    valid_to         timestamptz
);
CREATE UNIQUE INDEX model_prices_current ON model_prices (model_id) WHERE valid_to IS NULL;

CREATE TABLE fx_rates (
    id         uuid PRIMARY KEY,
    base       text NOT NULL CHECK (base ~ '^[A-Z]{3}$'),
    quote      text NOT NULL CHECK (quote ~ '^[A-Z]{3}$'),
    rate       numeric(40, 18) NOT NULL CHECK (rate > 0), -- units of quote for one unit of base
    source     text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    as_of      timestamptz, -- when the source says that the rate was made
    state      text NOT NULL DEFAULT 'accepted' -- what became of it (billing/fx/rates.py)
               CHECK (state IN ('accepted', 'held', 'disputed', 'alone', 'witness'))
);
CREATE INDEX fx_rates_last ON fx_rates (quote, (state = 'witness'), created_at, id);

-- What calls are priced with: immutable once quoted, the current one per currency has superseded_at NULL.
CREATE TABLE fx_quotes (
    id             uuid PRIMARY KEY,
    currency       text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    rate           numeric(40, 18) NOT NULL CHECK (rate > 0), -- units of currency for one USD
    markup_bps     integer NOT NULL CHECK (markup_bps BETWEEN 0 AND 100000),
    fx_rate_id     uuid REFERENCES fx_rates,
    created_at     timestamptz NOT NULL DEFAULT now(),
    superseded_at  timestamptz,
    confirmed_at   timestamptz, -- when a source last said so; NULL for a rate set by hand, which does not go stale
    good_for       interval CHECK (good_for > interval '0'), -- in place of the setting, for a rate set by hand that shall
    pinned         boolean NOT NULL DEFAULT false, -- fetched rates do not replace it
    markup_by_hand boolean NOT NULL DEFAULT false -- fetched rates keep it
);
CREATE UNIQUE INDEX fx_quotes_current ON fx_quotes (currency) WHERE superseded_at IS NULL;
INSERT INTO fx_quotes (id, currency, rate, markup_bps, markup_by_hand)
VALUES ('00000000-0000-0000-0000-000000000000', 'USD', 1, 0, true);

-- A process that makes calls. While its lease runs, its open calls are its own to settle; then the sweeper's.
CREATE TABLE workers (
    id          uuid PRIMARY KEY,
    host        text NOT NULL,
    pid         integer NOT NULL,
    started_at  timestamptz NOT NULL DEFAULT now(),
    lease_until timestamptz NOT NULL,
    stopped_at  timestamptz
);

-- The partitioned tables carry no foreign keys: open_batch and settle_batch alone write them.
CREATE TABLE calls (
    id                    uuid NOT NULL,
    user_id               uuid NOT NULL,
    wallet_id             uuid NOT NULL,
    key_id                uuid,
    worker_id             uuid NOT NULL,
    model                 text NOT NULL,
    stream                boolean NOT NULL,
    price_id              uuid NOT NULL,
    fx_quote_id           uuid NOT NULL,
    currency              text NOT NULL,
    hold_nano             bigint NOT NULL CHECK (hold_nano >= 0),
    hold_nanousd          bigint NOT NULL CHECK (hold_nanousd >= 0),
    -- posted + overdraft - held right after this hold: the evidence for I7. NULL for a loss booked on the house.
    available_after_nano  bigint CHECK (available_after_nano >= 0),
    state                 text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'settled', 'void', 'review')),
    opened_at             timestamptz NOT NULL DEFAULT now(),
    ended_at              timestamptz,
    outcome               text,
    generation_id         text,
    accuracy              text CHECK (accuracy IN ('exact', 'estimated')),
    cost_nanousd          bigint CHECK (cost_nanousd >= 0),          -- what the wallet was charged for
    provider_cost_nanousd bigint CHECK (provider_cost_nanousd >= 0), -- what the provider says it billed
    charge_nano           bigint CHECK (charge_nano >= 0),
    spread_nano           bigint CHECK (spread_nano >= 0),
    house_nanousd         bigint NOT NULL DEFAULT 0 CHECK (house_nanousd >= 0), -- the part of the cost the wallet did not pay
    PRIMARY KEY (id),
    CHECK (state NOT IN ('settled', 'void') OR (cost_nanousd IS NOT NULL AND charge_nano IS NOT NULL)),
    CHECK (state <> 'void' OR (cost_nanousd = 0 AND charge_nano = 0))
) PARTITION BY RANGE (id);
CREATE INDEX calls_live ON calls (wallet_id, id) WHERE state IN ('open', 'review');
-- What reconciliation asks the provider about.
CREATE INDEX calls_doubtful ON calls (id)
    WHERE (state = 'settled' AND (accuracy = 'estimated' OR provider_cost_nanousd IS NULL)) OR state = 'void';

CREATE TABLE usage (
    call_id            uuid NOT NULL PRIMARY KEY,
    source             text NOT NULL CHECK (source IN ('provider_cost', 'price_book', 'counted', 'noted')),
    prompt_tokens      bigint NOT NULL,
    completion_tokens  bigint NOT NULL,
    cached_read_tokens bigint NOT NULL DEFAULT 0,
    cached_write_tokens bigint NOT NULL DEFAULT 0,
    reasoning_tokens   bigint NOT NULL DEFAULT 0,
    first_byte_ms      integer,
    duration_ms        integer,
    created_at         timestamptz NOT NULL DEFAULT now(),
    -- What the other columns do not tell exactly: a cost that the provider names more finely than nano-dollars, and the parts
    -- of a prompt that are priced apart. A charge is explained by them.
    cost_attousd       numeric(40, 0) CHECK (cost_attousd >= 0),
    images             bigint NOT NULL DEFAULT 0,
    audio_tokens       bigint NOT NULL DEFAULT 0
) PARTITION BY RANGE (call_id);

-- Double entry, append-only. Signs: what is owed to others, and income, is positive; what we own, and expense, negative.
-- So a wallet's entries sum to its balance, and each transaction sums to zero per currency (I1).
-- A settlement's transaction id is its call id: a second one cannot be written.
CREATE TABLE journal_tx (
    id         uuid NOT NULL PRIMARY KEY,
    kind       text NOT NULL CHECK (kind IN ('settlement', 'grant', 'topup', 'refund', 'correction', 'house_loss', 'reversal',
                                            'dispute', 'payment_fee')),
    call_id    uuid,
    wallet_id  uuid,
    memo       text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now()
) PARTITION BY RANGE (id);

CREATE TABLE journal_entry (
    tx_id       uuid NOT NULL,
    seq         smallint NOT NULL,
    account     text NOT NULL CHECK (account IN ('wallet', 'psp_clearing', 'psp_fee', 'grant', 'revenue', 'fx_position',
                                                 'fx_spread', 'provider_prepaid', 'provider_cost', 'house_loss', 'suspense')),
    wallet_id   uuid,
    currency    text NOT NULL,
    amount_nano bigint NOT NULL CHECK (amount_nano <> 0),
    PRIMARY KEY (tx_id, seq),
    CHECK ((account = 'wallet') = (wallet_id IS NOT NULL))
) PARTITION BY RANGE (tx_id);
CREATE INDEX journal_tx_call ON journal_tx (call_id) WHERE kind <> 'settlement'; -- corrections and refunds of a call
CREATE INDEX journal_tx_payments ON journal_tx (id) WHERE kind IN ('topup', 'reversal', 'dispute'); -- I5, over all days
CREATE INDEX journal_tx_payment_fees ON journal_tx (memo) WHERE kind = 'payment_fee';
CREATE INDEX journal_entry_wallet ON journal_entry (wallet_id, tx_id) WHERE wallet_id IS NOT NULL;
CREATE INDEX journal_entry_psp ON journal_entry (currency) WHERE account = 'psp_clearing'; -- I5, over all days

-- The provider's USD as we see it: one row per settled batch, correction or observation of the provider's own total.
CREATE TABLE shadow_usd_ledger (
    id             uuid PRIMARY KEY,
    kind           text NOT NULL CHECK (kind IN ('opening', 'settlement', 'correction')),
    amount_nanousd bigint NOT NULL, -- consumed; 'opening' holds what the provider had billed before our first call
    calls          integer NOT NULL DEFAULT 0,
    memo           text NOT NULL DEFAULT '',
    created_at     timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX shadow_usd_ledger_opening ON shadow_usd_ledger (kind) WHERE kind = 'opening';

-- An effect that a caller may repeat: the key and the hash of its input, written with the effect.
CREATE TABLE posting_keys (
    key        text PRIMARY KEY,
    input_hash bytea NOT NULL,
    tx_id      uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- The default partitions take what no month covers, so that a settlement never fails for want of a partition.
CREATE TABLE calls_default PARTITION OF calls DEFAULT;
CREATE TABLE usage_default PARTITION OF usage DEFAULT;
CREATE TABLE journal_tx_default PARTITION OF journal_tx DEFAULT;
CREATE TABLE journal_entry_default PARTITION OF journal_entry DEFAULT;

-- A user's readable view of the journal.
CREATE VIEW transactions AS
SELECT t.id, e.wallet_id, t.kind, t.call_id, e.currency, e.amount_nano, t.memo, t.created_at
FROM journal_tx t JOIN journal_entry e ON e.tx_id = t.id
WHERE e.account = 'wallet';

-- What the provider's own records were compared with ours for, and what differed.
CREATE TABLE reconciliation_runs (
    id                     uuid PRIMARY KEY,
    started_at             timestamptz NOT NULL DEFAULT now(),
    ended_at               timestamptz,
    calls_checked          integer,
    our_total_nanousd      bigint,
    drift_nanousd          bigint
);
CREATE TABLE reconciliation_diffs (
    id               uuid PRIMARY KEY,
    run_id           uuid NOT NULL REFERENCES reconciliation_runs,
    call_id          uuid, -- NULL for what no call explains
    cause            text NOT NULL,
    ours_nanousd     bigint NOT NULL,
    provider_nanousd bigint,
    tx_id            uuid, -- the posting that repaired it
    created_at       timestamptz NOT NULL DEFAULT now(),
    note             text NOT NULL DEFAULT ''
);
CREATE INDEX reconciliation_diffs_run ON reconciliation_diffs (run_id);

-- The provider's quota, and what of it is leased to workers.
CREATE TABLE provider_quota (
    id              boolean PRIMARY KEY DEFAULT true CHECK (id), -- one row
    granted_nanousd bigint,      -- consumable in all, counted as `quota_slabs` counts; NULL: the provider names no limit
    left_nanousd    bigint,      -- as the provider said when it was last asked
    asked_at        timestamptz, -- by whichever worker's turn it was
    low             boolean NOT NULL DEFAULT false,
    paused_until    timestamptz, -- the provider refuses us: nothing is sent before
    pause_reason    text
);
INSERT INTO provider_quota DEFAULT VALUES;

-- leased: given to the worker since it began, spent: what its calls were settled at. What a worker may still use is
-- their difference; what is consumed of the quota for certain is the sum of what was spent. Worker 0 stands for all that
-- have ended, and for corrections.
CREATE TABLE quota_slabs (
    worker_id      uuid PRIMARY KEY,
    leased_nanousd bigint NOT NULL DEFAULT 0,
    spent_nanousd  bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
INSERT INTO quota_slabs (worker_id) VALUES ('00000000-0000-0000-0000-000000000000');

-- What each of the provider's own totals was before our first call: the zero from which I8 counts.
CREATE TABLE provider_openings (
    source        text PRIMARY KEY CHECK (source IN ('credits', 'key')),
    total_nanousd bigint NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now()
);

-- What one process among all does now and then, and when it last did: a turn is claimed by moving the time.
CREATE TABLE routine_turns (
    name     text PRIMARY KEY,
    taken_at timestamptz NOT NULL
);

-- Days whose books were proved once and need not be read again. A call's id and its settlement's tell when the call
-- arrived, so that a day is a range of ids. The journal is append-only; what is posted into a proved day all the same (a
-- call that took very long, a correction of its cost) is listed here, and counted beside it.
CREATE TABLE verified_days (
    day             date PRIMARY KEY,
    end_id          uuid NOT NULL UNIQUE, -- every id below it, from the previous day's on, is in this row
    calls           bigint NOT NULL,
    entries         bigint NOT NULL,
    settled_nanousd bigint NOT NULL, -- Σ cost of its settled calls, and of losses without a call
    cost_nanousd    bigint NOT NULL, -- Σ provider cost of its entries
    verified_at     timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE verified_wallets (
    wallet_id   uuid PRIMARY KEY,
    amount_nano bigint NOT NULL -- Σ entries of the wallet in all verified days
);
CREATE TABLE late_postings (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tx_id           uuid,                      -- a transaction posted into a verified day
    settled_nanousd bigint NOT NULL DEFAULT 0, -- by how much the settled cost of a verified day's calls changed
    created_at      timestamptz NOT NULL DEFAULT now()
);

-- Caps: limits on spending per window of a user's clock, on a wallet, a key or a user.
CREATE TABLE spending_caps (
    scope          text NOT NULL CHECK (scope IN ('wallet', 'key', 'user')),
    scope_id       uuid NOT NULL,
    period         text NOT NULL CHECK (period IN ('call', 'day', 'week', 'month', 'total')),
    user_id        uuid NOT NULL REFERENCES users,
    currency       text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'), -- the wallet's; USD for a user, whose wallets may differ
    limit_nano     bigint CHECK (limit_nano >= 0),   -- what the user set
    ceiling_nano   bigint CHECK (ceiling_nano >= 0), -- what the operator set; the user cannot lift it
    effective_nano bigint NOT NULL GENERATED ALWAYS AS (least(limit_nano, ceiling_nano)) STORED,
    updated_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (scope_id, period)
);
CREATE INDEX spending_caps_user ON spending_caps (user_id);

-- A user's cap counts USD of cost that their wallets paid for; the others count charges in the wallet's currency.
-- A window without a row has what its calls say (cap_usage); the row is made before the first of them changes.
CREATE TABLE cap_windows (
    scope_id   uuid NOT NULL,
    period     text NOT NULL,
    starts_at  timestamptz NOT NULL,
    ends_at    timestamptz NOT NULL,
    user_id    uuid NOT NULL,
    held_nano  bigint NOT NULL,
    spent_nano bigint NOT NULL,
    warned     smallint NOT NULL DEFAULT 0, -- percent of the cap that the user was told of
    PRIMARY KEY (scope_id, period, starts_at)
) WITH (fillfactor = 50);
CREATE INDEX cap_windows_end ON cap_windows (ends_at);

-- What a user is told, in order.
CREATE TABLE events (
    id         bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    user_id    uuid NOT NULL REFERENCES users,
    wallet_id  uuid,
    kind       text NOT NULL,
    body       jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX events_user ON events (user_id, id);
CREATE INDEX events_of_caps ON events (created_at) WHERE kind = 'cap.spent';

-- The audit log: who changed money or a permission, what it was before and is after. Rows are written by triggers in the
-- transaction that changes, never changed, and sealed in blocks, each a hash over the rows' stored bytes and the block before.

CREATE SEQUENCE audit_log_id; -- without a cache: who draws a number holds the lock that seal_audit waits for
CREATE TABLE audit_log (
    id         bigint PRIMARY KEY,
    at         timestamptz NOT NULL,
    actor      text NOT NULL, -- operator:NAME, user:ID, key:ID, payment:PROVIDER, admin, system: as the application said
    db_role    text NOT NULL, -- who had logged in to Postgres
    action     text NOT NULL, -- created, changed, removed, truncated; of a journal_tx, its kind
    subject    text NOT NULL, -- the table
    subject_id text NOT NULL, -- the row's key, its columns joined by colons
    user_id    uuid,
    wallet_id  uuid,
    request_id text,
    before     jsonb,
    after      jsonb,
    line       text NOT NULL  -- all of the above as one JSON object: the bytes that are sealed
);
CREATE INDEX audit_log_wallet ON audit_log (wallet_id, id) WHERE wallet_id IS NOT NULL;
CREATE INDEX audit_log_user ON audit_log (user_id, id) WHERE user_id IS NOT NULL;
CREATE INDEX audit_log_at ON audit_log (at);

-- leaves: SHA-256 of each row's line in UTF-8, one after the other, in the order of ids.
-- digest: SHA-256 of previous, '<number> <microseconds of sealed_at since 1970> ' in ASCII, and leaves.
CREATE TABLE audit_blocks (
    number    bigint PRIMARY KEY CHECK (number > 0), -- 1, 2, 3, …
    previous  bytea NOT NULL,                        -- the digest of the block before, empty for the first
    ids       bigint[] NOT NULL,
    leaves    bytea NOT NULL,
    sealed_at timestamptz NOT NULL,
    digest    bytea NOT NULL
);

REVOKE ALL ON audit_log, audit_blocks FROM PUBLIC;

-- Money from people: what was asked of a payment provider, what it says was paid, and what was taken back. A provider's
-- webhook is only a hint: everything here is applied from what its API answers, and may be applied again at any time.

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
    method_id       text,                           -- which means of payment one of kind 'auto' charges, of the customer provider_id
    method_due      boolean NOT NULL DEFAULT false, -- the payer let us keep what they pay with, and it is still to be noted
    UNIQUE (wallet_id, idempotency_key)
);
CREATE INDEX payment_intents_wallet ON payment_intents (wallet_id, id);
CREATE INDEX payment_intents_live ON payment_intents (wallet_id) WHERE state IN ('creating', 'pending');
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
    accepted_tx_ids uuid[] NOT NULL DEFAULT '{}', -- what gave its suspense to a wallet
    PRIMARY KEY (provider, provider_txn_id)
);
CREATE INDEX payment_credits_intent ON payment_credits (intent_id);
CREATE INDEX payment_credits_wallet ON payment_credits (wallet_id);
CREATE INDEX payment_credits_review ON payment_credits (created_at) WHERE state = 'review';

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
CREATE INDEX webhook_events_review ON webhook_events (received_at) WHERE state = 'review';

-- Wallets that top themselves up: with what, and when.
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

-- What was used, summed by wallet, quarter of an hour, model and key as calls end (docs/decisions/0013-usage-rollups.md).
-- A quarter of an hour, since every zone's clocks differ from UTC by whole quarters: any day or hour of theirs is a sum of quarters.
CREATE TABLE usage_rollup (
    wallet_id           uuid NOT NULL,
    quarter             timestamptz NOT NULL, -- when it begins; a call lies where its id says that it arrived
    model               text NOT NULL,
    key_id              uuid NOT NULL,        -- all zeros: somebody who had signed in, without a key
    calls               integer NOT NULL,     -- settled
    voids               integer NOT NULL,     -- ended at zero; nothing else is counted of them
    exact               integer NOT NULL,     -- of those settled
    prompt_tokens       bigint NOT NULL,
    completion_tokens   bigint NOT NULL,
    cached_read_tokens  bigint NOT NULL,
    cached_write_tokens bigint NOT NULL,
    reasoning_tokens    bigint NOT NULL,
    cost_nanousd        bigint NOT NULL,
    charge_nano         bigint NOT NULL,
    spread_nano         bigint NOT NULL,
    house_nanousd       bigint NOT NULL,
    first_byte_ms       bigint NOT NULL, -- sums, of those calls that the bins count
    duration_ms         bigint NOT NULL,
    first_byte_bins     integer[] NOT NULL, -- how many were faster than 100, 200, 400, … 102400 ms, and than nothing
    duration_bins       integer[] NOT NULL,
    PRIMARY KEY (wallet_id, quarter, model, key_id)
) PARTITION BY RANGE (quarter);
CREATE TABLE usage_rollup_default PARTITION OF usage_rollup DEFAULT;
-- For everybody's day, as its proof reads it: rows are written in the order of time, more or less.
CREATE INDEX usage_rollup_quarter ON usage_rollup USING brin (quarter) WITH (pages_per_range = 32, autosummarize = on);

-- What operators are told by webhook. An alert is one condition from its beginning to its end. told_at: when its latest message was written; NULL, if nobody
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

-- A wallet that is or was watched. seq: the number of its newest event. Whoever adds one holds this row until the commit, so
-- that numbers are given in the order of commits. posted, held, overdraft and status: as the newest event left them.
CREATE TABLE feeds (
    wallet_id      uuid PRIMARY KEY REFERENCES wallets,
    seq            bigint NOT NULL,
    watched_until  timestamptz NOT NULL, -- events are written until then, whether or not somebody listens
    posted_nano    bigint NOT NULL,
    held_nano      bigint NOT NULL,
    overdraft_nano bigint NOT NULL,
    status         text NOT NULL
) WITH (fillfactor = 50);
CREATE TABLE feed_events (
    wallet_id      uuid NOT NULL,
    seq            bigint NOT NULL,
    kind           text NOT NULL CHECK (kind IN ('hold', 'settlement', 'grant', 'topup', 'refund', 'correction', 'reversal',
                                                 'dispute', 'cap', 'low', 'auto_topup', 'wallet')),
    moved_nano     bigint NOT NULL, -- by how much the posted balance changed
    holds_nano     bigint NOT NULL, -- by how much what is held changed
    posted_nano    bigint NOT NULL, -- the balance after it
    held_nano      bigint NOT NULL,
    overdraft_nano bigint NOT NULL,
    status         text NOT NULL,
    call_id        uuid,
    body           jsonb NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (wallet_id, seq)
);
CREATE INDEX feed_events_age ON feed_events (created_at);

-- Who is signed in is asked of Supabase's auth.uid(); servers that have none get one like it.
DO $$
BEGIN
    IF to_regprocedure('auth.uid()') IS NULL THEN
        CREATE SCHEMA IF NOT EXISTS auth;
        CREATE FUNCTION auth.uid() RETURNS uuid LANGUAGE sql STABLE AS $uid$
            SELECT coalesce(nullif(current_setting('request.jwt.claim.sub', true), ''),
                            nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid
        $uid$;
    END IF;
END $$;
