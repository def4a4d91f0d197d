-- What the provider billed and no call explains.

-- What the provider billed without a call, or, where negative, what was posted so before and had a call after all.
CREATE OR REPLACE FUNCTION book_loss(p_tx uuid, p_amount bigint, p_memo text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO journal_tx (id, kind, memo) VALUES (p_tx, 'house_loss', p_memo);
    PERFORM post_entries(
        ARRAY[p_tx, p_tx, p_tx, p_tx], ARRAY[1, 2, 3, 4]::smallint[],
        ARRAY['house_loss', 'revenue', 'provider_cost', 'provider_prepaid'], ARRAY[NULL, NULL, NULL, NULL]::uuid[],
        ARRAY['USD', 'USD', 'USD', 'USD'], ARRAY[-p_amount, p_amount, -p_amount, p_amount]);
    INSERT INTO shadow_usd_ledger (id, kind, amount_nanousd, memo) VALUES (p_tx, 'correction', p_amount, 'reconciliation');
END $$;
