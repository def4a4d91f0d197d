-- Exchange rates from sources: everything they said is kept, what could be believed is quoted.

-- The current quotes; age_s: seconds since a source said so, by the clock that wrote it down.
CREATE OR REPLACE FUNCTION list_fx_quotes()
RETURNS TABLE (id uuid, currency text, rate numeric, markup_bps integer, markup_by_hand boolean, pinned boolean,
               age_s double precision, good_for_s double precision)
LANGUAGE sql STABLE AS $$
    SELECT f.id, f.currency, f.rate, f.markup_bps, f.markup_by_hand, f.pinned,
           extract(epoch FROM clock_timestamp() - f.confirmed_at)::double precision,
           extract(epoch FROM f.good_for)::double precision
    FROM fx_quotes f WHERE f.superseded_at IS NULL
$$;

-- Who decides what is quoted does so alone, from reading the current quotes to its commit.
CREATE OR REPLACE FUNCTION lock_fx() RETURNS void LANGUAGE sql AS $$
    SELECT pg_advisory_xact_lock(1719169396) -- "fxrt"
$$;

-- The last that was said of a currency, by whoever is quoted or by who is only compared with; NULL: nothing yet.
CREATE OR REPLACE FUNCTION last_rate(p_currency text, p_witness boolean) RETURNS fx_rates LANGUAGE sql STABLE AS $$
    SELECT r FROM fx_rates r WHERE r.quote = p_currency AND (r.state = 'witness') = p_witness
    ORDER BY r.created_at DESC, r.id DESC LIMIT 1
$$;

-- Keep what was said of currencies; what is only repeated is not written again. Returns the row of each, new or not.
CREATE OR REPLACE FUNCTION record_rates(
    p_id uuid[], p_currency text[], p_rate numeric[], p_source text[], p_state text[], p_as_of timestamptz[]
) RETURNS TABLE (currency text, state text, id uuid) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO fx_rates (id, base, quote, rate, source, state, as_of, created_at)
    SELECT n.id, 'USD', n.currency, n.rate, n.source, n.state, n.as_of, clock_timestamp()
    FROM unnest(p_id, p_currency, p_rate, p_source, p_state, p_as_of) AS n (id, currency, rate, source, state, as_of)
    CROSS JOIN LATERAL last_rate(n.currency, n.state = 'witness') last
    WHERE (last.rate, last.source, last.state, last.as_of) IS DISTINCT FROM (n.rate, n.source, n.state, n.as_of);
    RETURN QUERY
    SELECT n.currency, n.state, last.id FROM unnest(p_currency, p_state) AS n (currency, state)
    CROSS JOIN LATERAL last_rate(n.currency, n.state = 'witness') last;
END $$;

-- Quote a rate from now on; calls in flight keep theirs.
CREATE OR REPLACE FUNCTION quote_fx(
    p_id uuid, p_currency text, p_rate numeric, p_markup integer, p_markup_by_hand boolean, p_fx_rate uuid,
    p_confirmed timestamptz, p_good_for interval, p_pinned boolean
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE fx_quotes SET superseded_at = now() WHERE currency = p_currency AND superseded_at IS NULL;
    INSERT INTO fx_quotes (id, currency, rate, markup_bps, markup_by_hand, fx_rate_id, confirmed_at, good_for, pinned)
    VALUES (p_id, p_currency, p_rate, p_markup, p_markup_by_hand, p_fx_rate, p_confirmed, p_good_for, p_pinned);
END $$;

-- The sources still say what is quoted. A rate set by hand becomes theirs by it only where it was to go stale.
CREATE OR REPLACE FUNCTION confirm_fx(p_currency text) RETURNS void LANGUAGE sql AS $$
    UPDATE fx_quotes SET confirmed_at = now()
    WHERE currency = p_currency AND superseded_at IS NULL AND confirmed_at IS NOT NULL
$$;
