-- Notices of changes to the running workers.

-- Caches of the running workers follow what an operator changes. Arguments: what changed.
CREATE OR REPLACE FUNCTION notify_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('tuma', TG_ARGV[0] || ':' || CASE WHEN TG_ARGV[0] IN ('key', 'wallet', 'user') THEN NEW.id::text ELSE '' END);
    RETURN NULL;
END $$;
