-- Who is signed in, as policies and functions of people's own things see it.

-- Who is signed in. Who they are is said by the transaction (`app.user_id`, which Tuma sets) or by Supabase's auth.uid(), and
-- never by an argument.
CREATE OR REPLACE FUNCTION current_person() RETURNS uuid LANGUAGE sql STABLE AS $$
    SELECT coalesce(auth.uid(), nullif(current_setting('app.user_id', true), '')::uuid)
$$;

-- The same, refused where nobody is.
CREATE OR REPLACE FUNCTION require_person() RETURNS uuid LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF current_person() IS NULL THEN
        RAISE EXCEPTION 'nobody is signed in' USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN current_person();
END $$;
