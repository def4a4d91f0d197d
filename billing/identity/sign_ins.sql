-- People who sign in with a token of the frontend's own identity provider.

-- Who a token names, made on first sight, and the wallet that pays: p_wallet if it is theirs, else their oldest that is not
-- frozen, else their oldest. p_currency: the wallet that somebody without one is given; NULL: none.
-- A person is never recognised by an e-mail address: whoever can make the identity provider say one would be that person.
-- Where `sub` is a UUID it is the user's id, as in Supabase, whose auth.uid() then names our user.
CREATE OR REPLACE FUNCTION sign_in(p_subject text, p_email text, p_wallet uuid, p_currency text, p_new_user uuid, p_new_wallet uuid)
RETURNS TABLE (user_id uuid, status text, wallet_id uuid, currency text, user_requests_per_min bigint,
               user_tokens_per_min bigint, user_calls_in_flight bigint)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    person users%ROWTYPE;
    purse  wallets%ROWTYPE;
BEGIN
    SELECT * INTO person FROM users u WHERE u.subject = p_subject;
    IF NOT FOUND THEN
        INSERT INTO users (id, email, subject, signed_in_at)
        SELECT CASE WHEN p_subject ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
                         AND NOT EXISTS (SELECT FROM users u WHERE u.id = p_subject::uuid)
                    THEN p_subject::uuid ELSE p_new_user END,
               CASE WHEN NOT EXISTS (SELECT FROM users u WHERE lower(u.email) = lower(p_email)) THEN p_email END,
               p_subject, now()
        ON CONFLICT DO NOTHING;
        SELECT * INTO person FROM users u WHERE u.subject = p_subject;
        IF NOT FOUND THEN -- somebody else took the address or the id in this moment
            RAISE EXCEPTION 'sign in again' USING ERRCODE = 'serialization_failure';
        END IF;
    END IF;
    SELECT * INTO purse FROM wallets w
    WHERE w.user_id = person.id AND (p_wallet IS NULL OR w.id = p_wallet) ORDER BY w.status <> 'active', w.id LIMIT 1;
    IF NOT FOUND AND p_wallet IS NULL AND p_currency IS NOT NULL AND person.status = 'active' THEN
        PERFORM 1 FROM users u WHERE u.id = person.id FOR NO KEY UPDATE; -- one wallet, however many sign in at once
        INSERT INTO wallets (id, user_id, currency)
        SELECT p_new_wallet, person.id, p_currency WHERE NOT EXISTS (SELECT FROM wallets w WHERE w.user_id = person.id);
        SELECT * INTO purse FROM wallets w WHERE w.user_id = person.id ORDER BY w.id LIMIT 1;
    END IF;
    RETURN QUERY SELECT person.id, person.status, purse.id, purse.currency, person.requests_per_min, person.tokens_per_min,
                        person.calls_in_flight;
END $$;
