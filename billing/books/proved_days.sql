-- Days whose books were proved once and need not be read again.

-- Return those ids that lie in verified days, NULL if none does. A day is verified an hour and more after its end, under
-- the lock that is shared here: who posts into an older day either comes before its proof or sees it.
CREATE OR REPLACE FUNCTION find_verified(p_ids uuid[]) RETURNS uuid[] LANGUAGE plpgsql AS $$
DECLARE
    lowest uuid;
    cut    uuid;
BEGIN
    SELECT i.id INTO lowest FROM unnest(p_ids) AS i (id) ORDER BY i.id LIMIT 1;
    IF lowest >= uuid_floor(now() - interval '1 hour') THEN
        RETURN NULL;
    END IF;
    PERFORM pg_advisory_xact_lock_shared(1684109683); -- "days"
    SELECT d.end_id INTO cut FROM verified_days d ORDER BY d.day DESC LIMIT 1;
    IF cut IS NULL OR lowest >= cut THEN
        RETURN NULL;
    END IF;
    RETURN ARRAY(SELECT DISTINCT i.id FROM unnest(p_ids) AS i (id) WHERE i.id < cut);
END $$;
