-- Take the most urgent message out of its queue and record it as unacknowledged, in one step.
--
-- KEYS: unacked; unacked_index; the hint of each queue; then, for each priority from the most urgent down, the list of
--       each queue.
-- ARGV: the delivery tag; the time; the lifetime of a hint in seconds; then the name of each queue as JSON.
-- Returns the number of the queue, counted from 0, and the message; or nothing if all queues are empty.
--
-- Afterwards the hint of a queue exists if and only if the queue holds more messages. Redis does not roll back a script
-- that fails, so the message leaves its list last.
local FIRST_QUEUE = 4
local FIRST_HINT = 3
local queues, taken, more = #ARGV - FIRST_QUEUE + 1, false, {}
for i = FIRST_HINT + queues, #KEYS do
    local queue = (i - FIRST_HINT) % queues
    if not taken then
        local message = redis.call('LRANGE', KEYS[i], -1, -1)[1]
        if message then
            redis.call('HSET', KEYS[1], ARGV[1], '[' .. message .. ', "", ' .. ARGV[FIRST_QUEUE + queue] .. ']')
            redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1])
            redis.call('RPOP', KEYS[i])
            taken = {queue, message}
        end
    end
    more[queue] = more[queue] or redis.call('EXISTS', KEYS[i]) == 1
end
for queue = 0, queues - 1 do
    redis.call('DEL', KEYS[FIRST_HINT + queue])
    if more[queue] then
        redis.call('LPUSH', KEYS[FIRST_HINT + queue], '1')
        redis.call('EXPIRE', KEYS[FIRST_HINT + queue], ARGV[3])
    end
end
return taken
