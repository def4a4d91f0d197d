-- What posts to the journal, and what keeps it append-only.

-- The one function that posts entries of whole transactions (settle_batch writes its own, and checks them likewise): what
-- does not balance is refused, and what is posted into a proved day is listed.
CREATE OR REPLACE FUNCTION post_entries(
    p_tx uuid[], p_seq smallint[], p_account text[], p_wallet uuid[], p_currency text[], p_amount bigint[]
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    broken record;
    late   uuid[];
BEGIN
    SELECT e.tx, e.currency, sum(e.amount) AS total INTO broken
    FROM unnest(p_tx, p_currency, p_amount) AS e (tx, currency, amount)
    GROUP BY e.tx, e.currency HAVING sum(e.amount) <> 0 LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'transaction % does not balance: % % nano', broken.tx, broken.total, broken.currency
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;

    late := find_verified(p_tx);
    IF late IS NOT NULL THEN
        INSERT INTO late_postings (tx_id) SELECT DISTINCT l.id FROM unnest(late) AS l (id);
    END IF;
    INSERT INTO journal_entry (tx_id, seq, account, wallet_id, currency, amount_nano)
    SELECT * FROM unnest(p_tx, p_seq, p_account, p_wallet, p_currency, p_amount);

    UPDATE wallets w SET posted_nano = w.posted_nano + moved.amount
    FROM (SELECT e.wallet, sum(e.amount)::bigint AS amount
          FROM unnest(p_wallet, p_amount) AS e (wallet, amount) WHERE e.wallet IS NOT NULL GROUP BY e.wallet) moved
    WHERE w.id = moved.wallet;
END $$;

-- The trigger of what is append-only.
CREATE OR REPLACE FUNCTION refuse_rewrite() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: % refused', TG_TABLE_NAME, TG_OP USING ERRCODE = 'restrict_violation';
END $$;

-- The books are append-only: they are not truncated, either. A partition needs a trigger of its own; one that is detached
-- keeps it, and can be dropped.
CREATE OR REPLACE FUNCTION refuse_truncate(p_table text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('CREATE OR REPLACE TRIGGER %I BEFORE TRUNCATE ON %I FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite()',
                   p_table || '_not_truncated', p_table);
END $$;
