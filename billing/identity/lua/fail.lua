-- Count one failed authentication by GCRA, as in reserve.lua; one that is refused is not counted.
-- KEYS: 1 window   ARGV: 1 failures per minute
-- Returns the milliseconds to wait, 0 when it is within the limit.
local now = redis.call('TIME')
local now_us = now[1] * 1000000 + now[2]
local after = math.max(tonumber(redis.call('GET', KEYS[1]) or 0) - now_us, 0) + 60000000 / tonumber(ARGV[1])
if after > 60000000 then return math.ceil((after - 60000000) / 1000) end
redis.call('SET', KEYS[1], string.format('%.0f', now_us + after), 'PX', 61000)
return 0
