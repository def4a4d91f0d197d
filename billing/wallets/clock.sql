-- Windows of a user's clock, in which caps count.

-- The first moment at which the zone's clocks show this time; where they skip it, the moment that they skip it.
-- (Postgres itself takes the later of two such moments, PostgreSQL documentation, appendix B.2.)
CREATE OR REPLACE FUNCTION clock_moment(p_local timestamp, p_zone text) RETURNS timestamptz LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN early.at AT TIME ZONE p_zone = p_local THEN least(early.at, late.at) ELSE late.at END
    FROM (SELECT p_local AT TIME ZONE p_zone AS at) late
    CROSS JOIN LATERAL (
        SELECT late.at - interval '6 hours' AS before
    ) hours
    CROSS JOIN LATERAL (
        SELECT (p_local - (hours.before AT TIME ZONE p_zone - hours.before AT TIME ZONE 'UTC')) AT TIME ZONE 'UTC' AS at
    ) early
$$;

-- The window of a period that a moment lies in. `call` and `total` have no ends.
CREATE OR REPLACE FUNCTION cap_window(
    p_period text, p_moment timestamptz, p_zone text, p_week_starts integer,
    OUT starts_at timestamptz, OUT ends_at timestamptz
) LANGUAGE plpgsql STABLE AS $$
DECLARE
    clock timestamp := p_moment AT TIME ZONE p_zone;
    first timestamp;
    step  interval;
BEGIN
    CASE p_period
        WHEN 'day' THEN
            first := date_trunc('day', clock);
            step := '1 day';
        WHEN 'week' THEN
            first := date_trunc('day', clock) - make_interval(days => (extract(isodow FROM clock)::integer - p_week_starts + 7) % 7);
            step := '7 days';
        WHEN 'month' THEN
            first := date_trunc('month', clock);
            step := '1 month';
        ELSE
            starts_at := 'epoch';
            ends_at := '9999-12-31T00:00:00Z';
            RETURN;
    END CASE;
    starts_at := clock_moment(first, p_zone);
    ends_at := clock_moment(first + step, p_zone);
    -- Clocks that are set back over midnight show the day before once more: the new window has begun all the same.
    WHILE p_moment >= ends_at LOOP
        first := first + step;
        starts_at := ends_at;
        ends_at := clock_moment(first + step, p_zone);
    END LOOP;
END $$;
