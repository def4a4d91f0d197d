-- Read holds by their leases, by the clock that set them.
-- KEYS: 1 leases   ARGV: 1 limit  2 '1' for those alone whose lease has ended
local now = redis.call('TIME')
local top = ARGV[2] == '1' and string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000)) or '+inf'
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', top, 'LIMIT', 0, ARGV[1])
