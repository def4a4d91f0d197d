-- Months: ids tell when they were minted, and the big tables are partitioned by them.

-- The smallest UUIDv7 of a moment (RFC 9562, section 5.7: 48 bits of unix milliseconds first).
CREATE OR REPLACE FUNCTION uuid_floor(moment timestamptz) RETURNS uuid LANGUAGE sql IMMUTABLE AS $$
    SELECT (lpad(to_hex((extract(epoch FROM moment) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid
$$;

-- The moment that a UUIDv7 was minted, to the millisecond.
CREATE OR REPLACE FUNCTION uuid_moment(id uuid) RETURNS timestamptz LANGUAGE sql IMMUTABLE AS $$
    SELECT to_timestamp(('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint / 1000.0)
$$;

-- Make the month partitions from last month to `ahead` months from now. The default partitions take what no month
-- covers, so that a settlement never fails for want of a partition. The sums of usage have months of their own; what is
-- append-only is not truncated.
CREATE OR REPLACE FUNCTION ensure_partitions(ahead integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    parent text;
    month  timestamptz;
    next   timestamptz;
    child  text;
    made   integer := 0;
BEGIN
    FOREACH parent IN ARRAY ARRAY['calls', 'usage', 'usage_rollup', 'journal_tx', 'journal_entry'] LOOP
        FOR step IN -1..ahead LOOP
            month := date_trunc('month', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC' + make_interval(months => step);
            next := (month AT TIME ZONE 'UTC' + interval '1 month') AT TIME ZONE 'UTC';
            child := parent || to_char(month AT TIME ZONE 'UTC', '_YYYY_MM');
            IF to_regclass(child) IS NULL THEN
                EXECUTE format('CREATE TABLE %I PARTITION OF %I FOR VALUES FROM (%L) TO (%L)', child, parent,
                               CASE parent WHEN 'usage_rollup' THEN month::text ELSE uuid_floor(month)::text END,
                               CASE parent WHEN 'usage_rollup' THEN next::text ELSE uuid_floor(next)::text END);
                IF parent IN ('journal_tx', 'journal_entry') THEN
                    PERFORM refuse_truncate(child);
                END IF;
                made := made + 1;
            END IF;
        END LOOP;
    END LOOP;
    RETURN made;
END $$;
