-- RENEW: refresh the leases of all sessions of one worker, and say which of them it may not go on with.
-- KEYS the states. ARGV their epochs, in the same order. Answers one row for each refusal: {index from 1, verdict...}.
local now = redis.call('TIME')
local now_us = string.format('%.0f', now[1] * 1000000 + now[2])
local refused = {}
for index, key in ipairs(KEYS) do
  local state = redis.pcall('HMGET', key, 'epoch', 'fence', 'end', 'tlen', 'fenced_us')
  if state.err then -- one session's broken key must not cost the others their leases
    refused[#refused + 1] = {index, 'BROKEN'}
  elseif not state[1] or tonumber(state[1]) < tonumber(ARGV[index]) then
    refused[#refused + 1] = {index, 'ABSENT'}
  elseif state[1] ~= ARGV[index] then
    refused[#refused + 1] = {index, 'STALE', state[1]}
  else
    redis.call('HSET', key, 'lease_us', now_us)
    if state[2] then
      refused[#refused + 1] = {index, 'FENCED', state[3], state[4], state[2], state[5]}
    end
  end
end
return refused
