-- The core tables. Money at rest is bigint nano units (1e-9 of the currency beside it); prices and rates are numeric.
-- Ids are UUIDv7, made by the caller, so that the big tables can be partitioned by time through their ids.

CREATE TABLE users (
    id         uuid PRIMARY KEY,
    email      text NOT NULL,
    status     text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'disabled')),
    created_at timestamptz NOT NULL DEFAULT now()
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
    created_at     timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50); -- the hot rows: room for HOT updates
CREATE INDEX wallets_user ON wallets (user_id);

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
    revoked_at         timestamptz
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
    created_at timestamptz NOT NULL DEFAULT now()
);

-- What calls are priced with: immutable once quoted, the current one per currency has superseded_at NULL.
CREATE TABLE fx_quotes (
    id            uuid PRIMARY KEY,
    currency      text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    rate          numeric(40, 18) NOT NULL CHECK (rate > 0), -- units of currency for one USD
    markup_bps    integer NOT NULL CHECK (markup_bps BETWEEN 0 AND 100000),
    fx_rate_id    uuid REFERENCES fx_rates,
    created_at    timestamptz NOT NULL DEFAULT now(),
    superseded_at timestamptz
);
CREATE UNIQUE INDEX fx_quotes_current ON fx_quotes (currency) WHERE superseded_at IS NULL;
INSERT INTO fx_quotes (id, currency, rate, markup_bps) VALUES ('00000000-0000-0000-0000-000000000000', 'USD', 1, 0);

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
    created_at         timestamptz NOT NULL DEFAULT now()
) PARTITION BY RANGE (call_id);

-- Double entry, append-only. Signs: what is owed to others, and income, is positive; what we own, and expense, negative.
-- So a wallet's entries sum to its balance, and each transaction sums to zero per currency (I1).
-- A settlement's transaction id is its call id: a second one cannot be written.
CREATE TABLE journal_tx (
    id         uuid NOT NULL PRIMARY KEY,
    kind       text NOT NULL CHECK (kind IN ('settlement', 'grant', 'topup', 'refund', 'correction', 'house_loss')),
    call_id    uuid,
    wallet_id  uuid,
    memo       text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now()
) PARTITION BY RANGE (id);

CREATE TABLE journal_entry (
    tx_id       uuid NOT NULL,
    seq         smallint NOT NULL,
    account     text NOT NULL CHECK (account IN ('wallet', 'psp_clearing', 'grant', 'revenue', 'fx_position',
                                                 'fx_spread', 'provider_prepaid', 'provider_cost', 'house_loss', 'suspense')),
    wallet_id   uuid,
    currency    text NOT NULL,
    amount_nano bigint NOT NULL CHECK (amount_nano <> 0),
    PRIMARY KEY (tx_id, seq),
    CHECK ((account = 'wallet') = (wallet_id IS NOT NULL))
) PARTITION BY RANGE (tx_id);
CREATE INDEX journal_tx_call ON journal_tx (call_id) WHERE kind <> 'settlement'; -- corrections and refunds of a call
CREATE INDEX journal_entry_wallet ON journal_entry (wallet_id, tx_id) WHERE wallet_id IS NOT NULL;

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

CREATE FUNCTION refuse_rewrite() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: % refused', TG_TABLE_NAME, TG_OP USING ERRCODE = 'restrict_violation';
END $$;
CREATE TRIGGER journal_tx_append_only BEFORE UPDATE OR DELETE ON journal_tx FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER journal_entry_append_only BEFORE UPDATE OR DELETE ON journal_entry FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER shadow_usd_ledger_append_only BEFORE UPDATE OR DELETE ON shadow_usd_ledger FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER fx_rates_append_only BEFORE UPDATE OR DELETE ON fx_rates FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();

-- The smallest UUIDv7 of a moment (RFC 9562, section 5.7: 48 bits of unix milliseconds first).
CREATE FUNCTION uuid_floor(moment timestamptz) RETURNS uuid LANGUAGE sql IMMUTABLE AS $$
    SELECT (lpad(to_hex((extract(epoch FROM moment) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid
$$;

-- Make the month partitions from last month to `ahead` months from now. The default partitions take what no month
-- covers, so that a settlement never fails for want of a partition.
CREATE FUNCTION ensure_partitions(ahead integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    parent text;
    month  timestamptz;
    child  text;
    made   integer := 0;
BEGIN
    FOREACH parent IN ARRAY ARRAY['calls', 'usage', 'journal_tx', 'journal_entry'] LOOP
        FOR step IN -1..ahead LOOP
            month := date_trunc('month', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC' + make_interval(months => step);
            child := parent || to_char(month AT TIME ZONE 'UTC', '_YYYY_MM');
            IF to_regclass(child) IS NULL THEN
                EXECUTE format('CREATE TABLE %I PARTITION OF %I FOR VALUES FROM (%L) TO (%L)', child, parent,
                               uuid_floor(month), uuid_floor(month + interval '1 month'));
                made := made + 1;
            END IF;
        END LOOP;
    END LOOP;
    RETURN made;
END $$;
CREATE TABLE calls_default PARTITION OF calls DEFAULT;
CREATE TABLE usage_default PARTITION OF usage DEFAULT;
CREATE TABLE journal_tx_default PARTITION OF journal_tx DEFAULT;
CREATE TABLE journal_entry_default PARTITION OF journal_entry DEFAULT;
SELECT ensure_partitions(3);

-- A user's readable view of the journal.
CREATE VIEW transactions AS
SELECT t.id, e.wallet_id, t.kind, t.call_id, e.currency, e.amount_nano, t.memo, t.created_at
FROM journal_tx t JOIN journal_entry e ON e.tx_id = t.id
WHERE e.account = 'wallet';
