-- Read what reserve.lua would judge a call by; nothing is written. A mirror of another lineage is none.
-- KEYS: 1 mirror  then for each limiter: its window, its calls in flight
-- Returns {now in microseconds, {field, value, … of the mirror}, then for each limiter {requests, tokens, calls in flight}}.
local now = redis.call('TIME')
local known = redis.call('HGET', KEYS[1], 'lineage') == lineage()
local answer = {now[1] * 1000000 + now[2], known and redis.call('HGETALL', KEYS[1]) or {}}
for i = 2, #KEYS, 2 do
    local window = redis.call('HMGET', KEYS[i], 'requests', 'tokens')
    local live = redis.call('ZCOUNT', KEYS[i + 1], string.format('(%.0f', math.floor(answer[1] / 1000)), '+inf')
    answer[#answer + 1] = {window[1] or '0', window[2] or '0', live}
end
return answer
