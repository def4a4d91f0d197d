-- Tell whether a hold's lease has been renewed in time, by the clock that set it.
-- KEYS: 1 leases   ARGV: 1 lease member
-- Returns 1 or 0.
local now = redis.call('TIME')
local ends_ms = redis.call('ZSCORE', KEYS[1], ARGV[1])
return (ends_ms and tonumber(ends_ms) > now[1] * 1000 + math.floor(now[2] / 1000)) and 1 or 0
