-- Amounts as text.

-- Nano units as people write them: 1500000000 is 1.5.
CREATE OR REPLACE FUNCTION major_text(p_nano bigint) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT trim_scale(p_nano::numeric / 1000000000)::text
$$;
