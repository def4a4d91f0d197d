-- What a program asks of the schema before it runs.

-- The number of the newest migration that was applied.
CREATE OR REPLACE FUNCTION read_schema() RETURNS integer LANGUAGE sql STABLE AS $$
    SELECT coalesce(max(s.number), 0) FROM schema_migrations s
$$;

-- Whether a program's functions were applied: then they are there, or newer ones under the same signatures.
CREATE OR REPLACE FUNCTION has_functions(p_number integer, p_digest text) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM schema_functions f WHERE f.number = p_number AND f.digest = p_digest)
$$;
