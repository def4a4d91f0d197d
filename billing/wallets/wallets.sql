-- Users and their wallets, and what an operator gives and sets.

CREATE OR REPLACE FUNCTION create_user(p_id uuid, p_email text, p_subject text) RETURNS void LANGUAGE sql AS $$
    INSERT INTO users (id, email, subject) VALUES (p_id, p_email, p_subject)
$$;

-- Limits of 0 lift those of the user's own; what is NULL stays as it is. False: there is no such user.
CREATE OR REPLACE FUNCTION set_user(
    p_user uuid, p_status text, p_requests_per_min bigint, p_tokens_per_min bigint, p_calls_in_flight bigint
) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE users u SET status = coalesce(p_status, u.status),
           requests_per_min = nullif(coalesce(p_requests_per_min, u.requests_per_min), 0),
           tokens_per_min = nullif(coalesce(p_tokens_per_min, u.tokens_per_min), 0),
           calls_in_flight = nullif(coalesce(p_calls_in_flight, u.calls_in_flight), 0)
    WHERE u.id = p_user;
    RETURN FOUND;
END $$;

CREATE OR REPLACE FUNCTION create_wallet(p_id uuid, p_user uuid, p_currency text, p_overdraft bigint) RETURNS void LANGUAGE sql AS $$
    INSERT INTO wallets (id, user_id, currency, overdraft_nano) VALUES (p_id, p_user, p_currency, p_overdraft)
$$;

-- What is NULL stays as it is. False: there is no such wallet. An operator's freezing is marked as theirs: a dispute that
-- ends does not lift it.
CREATE OR REPLACE FUNCTION set_wallet(p_wallet uuid, p_status text, p_overdraft bigint, p_reason text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE wallets w SET status = coalesce(p_status, w.status), overdraft_nano = coalesce(p_overdraft, w.overdraft_nano),
           frozen_by = CASE p_status WHEN 'frozen' THEN 'operator' WHEN 'active' THEN NULL ELSE w.frozen_by END,
           status_reason = CASE WHEN p_status IS NULL THEN w.status_reason ELSE coalesce(p_reason, '') END
    WHERE w.id = p_wallet;
    RETURN FOUND;
END $$;

-- Whose wallet it is.
CREATE OR REPLACE FUNCTION find_owner(p_wallet uuid) RETURNS uuid LANGUAGE sql STABLE AS $$
    SELECT w.user_id FROM wallets w WHERE w.id = p_wallet
$$;

-- Set below which balance a person wants to be told of their wallet; NULL: never.
CREATE OR REPLACE FUNCTION own_set_low(p_wallet uuid, p_low bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE wallets w SET low_nano = p_low WHERE w.id = p_wallet AND w.user_id = require_person();
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no wallet %', p_wallet USING ERRCODE = 'no_data_found';
    END IF;
END $$;

-- Put money into a wallet from an operator's hand. Idempotent by key: a repeat with the same input returns the first
-- transaction; with another input it is refused.
CREATE OR REPLACE FUNCTION grant_credit(p_tx uuid, p_wallet uuid, p_amount bigint, p_memo text, p_key text, p_hash bytea)
RETURNS TABLE (tx_id uuid, posted_nano bigint) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    coin  text;
    first record;
BEGIN
    IF p_amount <= 0 THEN
        RAISE EXCEPTION 'a credit must be positive' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    SELECT w.currency INTO coin FROM wallets w WHERE w.id = p_wallet FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no wallet %', p_wallet USING ERRCODE = 'no_data_found';
    END IF;
    INSERT INTO posting_keys (key, input_hash, tx_id) VALUES (p_key, p_hash, p_tx) ON CONFLICT (key) DO NOTHING;
    SELECT k.tx_id, k.input_hash INTO first FROM posting_keys k WHERE k.key = p_key;
    IF first.input_hash <> p_hash THEN
        RAISE EXCEPTION 'idempotency key % was used with another input', p_key USING ERRCODE = 'unique_violation';
    END IF;
    IF first.tx_id = p_tx THEN
        INSERT INTO journal_tx (id, kind, wallet_id, memo) VALUES (p_tx, 'grant', p_wallet, p_memo);
        PERFORM post_entries(ARRAY[p_tx, p_tx], ARRAY[1, 2]::smallint[], ARRAY['wallet', 'grant'],
                             ARRAY[p_wallet, NULL], ARRAY[coin, coin], ARRAY[p_amount, -p_amount]);
        PERFORM pg_notify('tuma', 'wallet:' || p_wallet);
    END IF;
    RETURN QUERY SELECT first.tx_id, w.posted_nano FROM wallets w WHERE w.id = p_wallet;
END $$;
